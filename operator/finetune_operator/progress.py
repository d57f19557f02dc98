"""Asks a running trainer for its progress. Cosmetic: whatever goes wrong, the answer is simply missing."""

import aiohttp
from finetune_api import names
from finetune_api.progress import MAX_BYTES, TIMEOUT_SECONDS, ProgressReport
from pydantic import ValidationError


async def read_progress(session: aiohttp.ClientSession, pod_ip: str, train_digest: str) -> ProgressReport | None:
    """What the trainer says; None when it does not answer in time, says too much, or speaks of another training.

    Args:
        session: shared by all jobs.
        pod_ip: address of a pod that the Job owns.
        train_digest: what it must be working on.
    """
    host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
    url = f"http://{host}:{names.PROGRESS_PORT}/progress"
    try:
        # No redirects: a pod must not be able to send the operator anywhere.
        async with session.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)) as response:
            if response.status != 200:
                return None
            body = await response.content.read(MAX_BYTES)
        report = ProgressReport.model_validate_json(body)
    except (aiohttp.ClientError, TimeoutError, ValidationError, ValueError):
        return None
    return report if report.train_digest == train_digest else None
