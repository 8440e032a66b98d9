"""Train with TRL's SFTTrainer, its packing and a PEFT adapter; the two marked lines make it sparse.

    pip install trl
    python examples/trl_sft.py --data books/*.txt --output runs/sft

Every file is one document; the last one is held out. Three settings matter for long documents:

- `packing_strategy="bfd_split"` keeps every token and every document by itself. The default `"bfd"` throws away what a
  document has beyond `max_length`; `"wrapped"` joins documents without a bound, so that they see each other.
- `packing=True`: TRL sends no attention mask, and positions restart at each document. That is how S2-Attn knows where
  documents begin; TRL asks for FlashAttention here, but S2-Attn and sdpa keep documents apart as well.
- `activation_checkpointing=True`: TRL's default, by the name that transformers does not call deprecated.

TRL reports its use to Hugging Face unless HF_HUB_DISABLE_TELEMETRY=1 is set.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import longlora  # line 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line; None reads them from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id [%(default)s]")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="UTF-8 text files, the last is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps [%(default)s]")
    parser.add_argument("--context-length", type=int, default=8192, help="tokens in a packed row [%(default)s]")
    parser.add_argument("--group-size", type=int, default=2048, help="tokens in a group of S2-Attn [%(default)s]")
    parser.add_argument("--accumulate", type=int, default=8, help="rows in a step [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="[%(default)s]")
    args = parser.parse_args(argv)
    if len(args.data) < 2:
        parser.error("--data needs two files or more: the last one is held out")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, train, measure again, save."""
    args = parse_arguments(argv)
    texts = [path.read_text(encoding="utf-8") for path in args.data]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    longlora.use_s2(model, group_size=args.group_size, sink_tokens=4)  # line 2

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(args.output),
            max_length=args.context_length,
            packing=True,
            packing_strategy="bfd_split",
            max_steps=args.steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate,
            activation_checkpointing=True,
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": texts[:-1]}),
        eval_dataset=Dataset.from_dict({"text": texts[-1:]}),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss, full attention: {before:.4f} before, {after:.4f} after {args.steps} steps")
    trainer.save_model()
    print(f"adapter: {args.output}")


if __name__ == "__main__":
    main()
