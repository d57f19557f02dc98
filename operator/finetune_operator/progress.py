"""Asks a trainer's endpoint how far it is: cosmetics, so every failure is None. The pod is the container's author's: nothing it says is trusted."""

import asyncio

import aiohttp
from finetune_api.names import PROGRESS_PORT
from finetune_api.progress import MAX_BYTES, TIMEOUT_SECONDS, ProgressReport
from pydantic import ValidationError


async def read_progress(session: aiohttp.ClientSession, pod_ip: str, port: int = PROGRESS_PORT) -> ProgressReport | None:
    """The report of the trainer at this address; None when there is none within 2 s and 64 KiB, without following a redirect.

    Args:
        pod_ip: from the status of a pod that the Job controls; decide.py chooses it.
    """
    host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
    limit = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with session.get(f"http://{host}:{port}/progress", timeout=limit, allow_redirects=False) as response:
            if response.status != 200:
                return None
            body = await _read_at_most(response.content, MAX_BYTES)
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError, ValueError):
        return None
    try:
        return ProgressReport.model_validate_json(body) if body is not None else None
    except ValidationError:
        return None


async def _read_at_most(stream: aiohttp.StreamReader, limit: int) -> bytes | None:
    parts = bytearray()
    async for part in stream.iter_any():
        parts += part
        if len(parts) > limit:
            return None
    return bytes(parts)
