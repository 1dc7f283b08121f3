"""Documents per second of datatrove's inference runner with checkpoints on, for generation.py.

    <a Python that has datatrove> benchmarks/datatrove_peer.py --documents 1000 --in-flight 256 \\
        --latency 0.01 --calls 1 --folder DIR

datatrove lives in a virtual environment of its own:

    pip install 'datatrove[io]' aiofiles aiosqlite httpx orjson xxhash

With `--url` the peer calls that server, as it does in use; with `--own-server` the stub that ships
with it, which answers one call at a time, without latency. Without either the server is replaced by
a pause, and there is no HTTP: the peer's best case. The last line printed is JSON. What is timed is
the peer's own `inference_time`: all its documents and commits, not its imports. It waits there for
the first look whether the server is there: a tenth of a second or two.

The stub that ships with it keeps five connections waiting and drops others, which try again after
a second or more: without checkpoints, where nothing else takes as long, that makes its rate uneven.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

import httpx  # noqa: F401 - the peer imports it when it first calls a server
from datatrove.data import Document
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import DummyServer
from datatrove.pipeline.writers import JsonlWriter
from loguru import logger

TEXT = "A reply of about a hundred words, as the stub of the other side gives it. " * 7
_CHUNKED = "${rank}_chunk_${chunk_index}.jsonl"


class PausingServer(DummyServer):
    """Answers after a while, and needs no time to start."""

    latency_s = 0.0

    async def bg_start_server(self):
        self._server_ready.set_result(True)

    async def _make_request(self, payload):
        await asyncio.sleep(self.latency_s)
        return {
            "choices": [{"message": {"content": TEXT}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--latency", type=float, required=True)
    parser.add_argument("--calls", type=int, default=1, help="calls of a document, one by one")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--url", help="of a server of the OpenAI protocol; --latency is its own")
    parser.add_argument("--own-server", action="store_true", help="the stub that ships with it")
    parser.add_argument("--no-checkpoints", action="store_true")
    arguments = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    PausingServer.latency_s = arguments.latency

    async def rollout(document, generate):
        for number in range(arguments.calls):
            content = f"{number} {document.text}"
            result = await generate({"messages": [{"role": "user", "content": content}]})
        return result

    output = arguments.folder / "output"
    runner = InferenceRunner(
        rollout_fn=rollout,
        config=InferenceConfig(
            server_type="endpoint" if arguments.url else "dummy",
            endpoint_url=arguments.url,
            model_name_or_path="stub",
            max_concurrent_generations=arguments.in_flight,
        ),
        output_writer=JsonlWriter(
            str(output),
            output_filename=None if arguments.no_checkpoints else _CHUNKED,
            compression=None,
        ),
        checkpoints_local_dir=(
            None if arguments.no_checkpoints else str(arguments.folder / "checkpoints")
        ),
    )
    if not (arguments.url or arguments.own_server):
        runner._init_server = lambda rank: PausingServer(runner.config, rank)
    documents = [
        Document(text=f"Tell me about the number {number}.", id=str(number))
        for number in range(arguments.documents)
    ]
    runner.run(iter(documents))
    seconds = runner.stats.stats["inference_time"].total
    written = sum(path.read_text().count("\n") for path in output.rglob("*.jsonl"))
    if written != arguments.documents:
        raise RuntimeError(f"{written} of {arguments.documents} documents were written")
    print(json.dumps({"documents": written, "seconds": seconds}))


if __name__ == "__main__":
    main()
