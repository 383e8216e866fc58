"""Tells a request that its client has gone. Starlette tells streams alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from sparq.serving.inference import disconnected


class Disconnects:
    """ASGI middleware: reads on while the application works, and sets `disconnected` when there is nobody any more."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = threading.Event()
        token = disconnected.set(gone)
        messages: asyncio.Queue = asyncio.Queue()

        async def read() -> None:
            while not gone.is_set():
                message = await receive()
                if message["type"] == "http.disconnect":
                    gone.set()
                messages.put_nowait(message)

        reading = asyncio.create_task(read())
        try:
            await self.app(scope, messages.get, send)
        finally:
            gone.set()  # whatever goes on, goes on for nobody
            reading.cancel()
            disconnected.reset(token)
