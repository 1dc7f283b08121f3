"""A server of the OpenAI chat protocol that waits and answers, for generation.py.

    python benchmarks/stub_server.py --latency 0.01

Prints its port and serves until its standard input is closed. Every reply has other words, as
nothing that compares replies should find two alike. It has one process, no framework, and keeps
connections open for clients that do.
"""

import argparse
import asyncio
import itertools
import json
import sys

_REPLY = "Describe in {number} words how the parts of a plan fit together, and name one risk. " * 5
_USAGE = {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200}
_numbers = itertools.count(1)


def reply(is_chat: bool) -> bytes:
    """The body of a response."""
    if not is_chat:
        return json.dumps({"object": "list", "data": [{"id": "stub", "object": "model"}]}).encode()
    message = {"role": "assistant", "content": _REPLY.format(number=next(_numbers))}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"choices": [choice], "usage": _USAGE}).encode()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, latency: float) -> None:
    """One connection, request after request."""
    try:
        while head := await reader.readuntil(b"\r\n\r\n"):
            first, *lines = head.decode("latin-1").split("\r\n")
            fields = {
                key.lower(): value for key, _, value in (one.partition(": ") for one in lines)
            }
            await reader.readexactly(int(fields.get("content-length", 0)))
            is_chat = first.startswith("POST")
            if is_chat:
                await asyncio.sleep(latency)
            body = reply(is_chat)
            last = fields.get("connection", "").lower() == "close"
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Connection: %b\r\nContent-Length: %d\r\n\r\n%b"
                % (b"close" if last else b"keep-alive", len(body), body)
            )
            await writer.drain()
            if last:
                return
    except (asyncio.IncompleteReadError, ConnectionError):
        pass  # the client has gone
    finally:
        writer.close()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, required=True, help="seconds of a call")
    arguments = parser.parse_args()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await serve(reader, writer, arguments.latency)

    server = await asyncio.start_server(connected, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
