# SPDX-License-Identifier: Apache-2.0
"""The ClientApp: Flower messages in, Flower messages out, everything between is the Site's.

Promises that the site is opened by the function given at the site, never by anything in the message.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from veil.client.site import Site
from veil.common.delivery import Progress, Standing
from veil.common.errors import RefusalCode
from veil.common.exchange import KeyReply, OfferReply, RoundReply, StatementReply, Willingness
from veil.common.wire import (
    CHUNK,
    KEYS,
    MANIFEST,
    OFFER,
    STATEMENT,
    WireError,
    decode_chunk,
    decode_manifest,
    decode_offer,
    decode_request,
    encode_key_reply,
    encode_offer_reply,
    encode_progress,
    encode_reply,
    encode_statement_reply,
)

_NO_DELIVERY = Progress(manifest="", standing=Standing.REFUSED, refusal=RefusalCode.MALFORMED)


def client_app(open_site: Callable[[Context], Site]) -> ClientApp:
    """The one ClientApp of simulation and deployment.

    Args:
        open_site: finds the site from what the site itself configured (its node), not from the run.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = open_site(context)
        try:
            reply = site.answer(decode_request(message.content))
        except WireError:
            reply = RoundReply(site=site.policy.name, job="", round=-1, refusal=RefusalCode.MALFORMED)
        return Message(content=encode_reply(reply), reply_to=message)

    @app.query(OFFER)
    def consider(message: Message, context: Context) -> Message:
        try:
            reply = open_site(context).consider(decode_offer(message.content))
        except WireError:
            reply = OfferReply(job="", willingness=Willingness.REFUSED, refusal=RefusalCode.MALFORMED)
        return Message(content=encode_offer_reply(reply), reply_to=message)

    @app.query(MANIFEST)
    def begin(message: Message, context: Context) -> Message:
        try:
            progress = open_site(context).receive(decode_manifest(message.content))
        except WireError:
            progress = _NO_DELIVERY
        return Message(content=encode_progress(progress), reply_to=message)

    @app.query(CHUNK)
    def receive(message: Message, context: Context) -> Message:
        try:
            progress = open_site(context).receive(decode_chunk(message.content))
        except WireError:
            progress = _NO_DELIVERY
        return Message(content=encode_progress(progress), reply_to=message)

    @app.query(STATEMENT)
    def attest(message: Message, context: Context) -> Message:
        try:
            reply = open_site(context).attest(decode_offer(message.content))
        except WireError:
            reply = StatementReply(job="", refusal=RefusalCode.MALFORMED)
        return Message(content=encode_statement_reply(reply), reply_to=message)

    @app.query(KEYS)
    def share_key(message: Message, context: Context) -> Message:
        try:
            reply = open_site(context).share_key(decode_offer(message.content))
        except WireError:
            reply = KeyReply(job="", refusal=RefusalCode.MALFORMED)
        return Message(content=encode_key_reply(reply), reply_to=message)

    return app
