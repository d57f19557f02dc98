"""Loading takes the weights once: a process that loads a sharded model and reads every weight has grown by no more than their bytes.

Where the dtype changes on the way, the pages of the files come on top for a while; they are the page cache's, and the kernel takes them back
when it needs them. So there only the memory that it can't take back is held to the bar.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_model import tiny_llama

CODE = """
import sys
from pathlib import Path
from finetune_trainer.base_model import load_base

def resident(name):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)).split()[1]) * 1024

before, anonymous = resident("VmRSS"), resident("RssAnon")
model = load_base(Path(sys.argv[1]), sys.argv[2], trust_remote_code=False)
total = sum(float(item.sum()) for item in model.parameters())
print(resident("VmHWM") - before, resident("RssAnon") - anonymous, sum(item.numel() * item.element_size() for item in model.parameters()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sharded_model_is_loaded_with_its_weights_once(dtype: str, tmp_path: Path) -> None:
    tiny_llama(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=12
    ).save_pretrained(tmp_path, max_shard_size="40MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path), dtype], capture_output=True, text=True, check=True)
    peak, unreclaimable, weights = (int(number) for number in done.stdout.split())
    slack = 40 * 2**20  # one shard, and what else a process allocates meanwhile
    assert weights > 70 * 2**20
    assert (peak if dtype == "float32" else unreclaimable) < 1.05 * weights + slack
