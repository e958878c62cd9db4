"""Samples that several tests of rewards share."""

from example_tokenizers import TOKENIZER

from minillm_jax.chat import render
from minillm_jax.data.records import RLRecord
from rl.rewards import Sample

END = TOKENIZER.eos_token_id


def sample(completion="yes", *, line=1, finished=True, **row):
    row = {"prompt": "question", "answer": "yes"} | row
    record = RLRecord("rows.jsonl", line, [{"role": "user", "content": row["prompt"]}], row["answer"], row=row)
    ids = TOKENIZER.encode(completion) + [END] * finished
    prompt_ids = render(TOKENIZER, record.conversations, add_generation_prompt=True).token_ids
    return Sample(prompt_ids, ids, TOKENIZER.decode(prompt_ids), completion, finished, record)


def samples(*completions):
    return [sample(completion, line=i + 1) for i, completion in enumerate(completions)]
