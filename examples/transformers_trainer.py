"""Train with transformers' Trainer and PEFT on long packed documents; the two marked lines make it sparse.

    python examples/transformers_trainer.py --data books/*.txt --output runs/trainer

Every file is one document; the last one is held out. Training uses shifted sparse attention (S2-Attn),
`trainer.evaluate()` full attention, because Trainer puts the model into evaluation mode there. OUTPUT holds a PEFT
adapter; `AutoModelForCausalLM.from_pretrained(OUTPUT)` loads it on its base model, without longlora.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import longlora  # line 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line; None reads them from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="folder or hub id [%(default)s]")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="UTF-8 text files, the last is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps [%(default)s]")
    parser.add_argument("--context-length", type=int, default=8192, help="longest piece in tokens [%(default)s]")
    parser.add_argument("--group-size", type=int, default=2048, help="tokens in a group of S2-Attn [%(default)s]")
    parser.add_argument("--pieces", type=int, default=2, help="pieces packed into one row [%(default)s]")
    parser.add_argument("--accumulate", type=int, default=4, help="rows in a step [%(default)s]")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="[%(default)s]")
    args = parser.parse_args(argv)
    if len(args.data) < 2:
        parser.error("--data needs two files or more: the last one is held out")
    return args


def tokenize(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, context_length: int) -> Dataset:
    """The token ids of each file, cut into pieces of at most `context_length`."""
    documents = tokenizer([path.read_text(encoding="utf-8") for path in files])["input_ids"]
    pieces = [ids[at : at + context_length] for ids in documents for at in range(0, len(ids), context_length)]
    return Dataset.from_dict({"input_ids": [piece for piece in pieces if len(piece) > 1]})


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, train, measure again, save."""
    args = parse_arguments(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    longlora.use_s2(model, group_size=args.group_size, sink_tokens=4)  # line 2

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.pieces,
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
        train_dataset=tokenize(args.data[:-1], tokenizer, args.context_length),
        eval_dataset=tokenize(args.data[-1:], tokenizer, args.context_length),
        # Packs the pieces of a batch into one row: positions restart at each piece and there is no attention mask.
        # That is how transformers, and S2-Attn with it, knows where documents begin.
        data_collator=DataCollatorWithFlattening(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"held-out loss, full attention: {before:.4f} before, {after:.4f} after {args.steps} steps")
    trainer.save_model()
    print(f"adapter: {args.output}")


if __name__ == "__main__":
    main()
