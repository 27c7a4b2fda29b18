"""What most people do today: load the model, merge_and_unload, save.

    python benchmarks/peft_merge.py BASE ADAPTER OUT

The same arithmetic, with the whole model in memory.
"""

from __future__ import annotations

import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; a look-up would only add its timeout

from peft import PeftModel
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    base, adapter, out = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out)
