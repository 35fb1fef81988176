# SPDX-License-Identifier: Apache-2.0
"""The ClientApp: a Flower message in, a Flower message out, everything between is the Site's.

Promises that the site is opened by the function given at the site, never by anything in the message.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from veil.client.site import Site
from veil.common.errors import RefusalCode
from veil.common.exchange import RoundReply
from veil.common.wire import WireError, decode_request, encode_reply


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

    return app
