"""One rank of a training by transformers' own Trainer, in the environment that torchrun gives: run plain, and watched.

``python trainer_rank.py FOLDER MAX_STEPS NUM_BATCHES`` leaves in FOLDER, of this rank and either run, the weights, the
losses and the warnings.
"""

import json
import os
import sys
import warnings
from pathlib import Path

import planted
import torch
import transformers

import effkit as ek


class Dropping(torch.nn.Module):
    """A model whose forward draws random numbers: a draw too many anywhere before would show in its weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = ek.models.text(layers=1, hidden=32, ffn=64)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        drop = torch.rand(input_ids.shape) < 0.2
        with torch.profiler.record_function(f"autocast {torch.is_autocast_enabled('cpu')}"):
            return self.inner(input_ids=input_ids.masked_fill(drop, 5), attention_mask=attention_mask, labels=labels)


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        with torch.profiler.record_function("own loss"):
            output = model(**inputs)
            loss = 3 * output.loss + output.logits.float().square().mean()
        return (loss, output) if return_outputs else loss


def train(folder, name, max_steps, given):
    args = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, ddp_backend="gloo", seed=0,
        bf16=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = OwnLoss(
        Dropping(),
        args,
        train_dataset=planted.Texts([12, 7, 9, 30] * 16),
        data_collator=planted.padded,
        callbacks=given,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    rank = os.environ["RANK"]
    torch.save(trainer.model.state_dict(), folder / f"{name}{rank}.pt")
    told = {"losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "warnings": [str(each.message) for each in said if "effkit" in str(each.message)],
            "studied": bool(given) and given[0].study is not None}  # fmt: skip
    (folder / f"{name}{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, steps, batches = Path(sys.argv[1]), *map(int, sys.argv[2:])
    train(where, "plain", steps, [])
    train(where, "watched", steps, [ek.advice.trainer_callback(num_batches=batches)])
    torch.distributed.destroy_process_group()
