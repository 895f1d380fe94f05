"""Train the tiny Llama of this folder (1.9 M parameters) from the King James Bible.

What: writes a Hugging Face model folder (bf16 safetensors, byte-level BPE tokenizer, model card)
that transformers and vLLM load as it is, and the held-out text next to it. The book of Daniel is
held out: neither the tokenizer nor the model sees it.

How (on Debian or Ubuntu, with torch >= 2.9 and transformers >= 5; a CPU is enough):

    sudo apt-get install bible-kjv bible-kjv-text
    bible -f gen1:1-rev22:21 </dev/null >kjv.txt
    python serving_examples/train_tiny_model.py --text kjv.txt --out serving_examples/tiny-llama

The learning rate follows the clock, so a slower machine takes fewer steps, not more time.

Licence: this script is Apache-2.0, as is the repository. The King James text is public domain
(the copyright of the 1611 translation has expired); the trained weights are CC0-1.0.
"""

import argparse
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, HELDOUT = "<s>", "</s>", "Dan"
VOCAB, CONTEXT, BATCH_TOKENS, RATE = 1536, 512, 2048, 4e-3
VERSE = re.compile(r"(?P<chapter>(?P<book>\d?[A-Za-z]+)\d+):\d+ (?P<words>.+)")
LAYERS = {"num_hidden_layers": 3, "hidden_size": 256, "intermediate_size": 384}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SIZES = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
SHAPE = LAYERS | HEADS | SIZES | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
PROMPTS = ("In the beginning", "And the LORD said unto", "Blessed is the man that")

MODEL_CARD = """---
license: cc0-1.0
language: en
pipeline_tag: text-generation
---
# tiny-llama

A Llama of {parameters:,} parameters that writes King James English: `LlamaForCausalLM`, bf16,
{architecture}.

- Tokenizer: byte-level BPE; adds no BOS. A line is a verse; in training each chapter stood
  between `<s>` and `</s>`.
- Text: the King James Bible of Debian's package `bible-kjv-text`, public domain. Held out: the
  book of Daniel (`{heldout_name}`, {heldout_tokens:,} tokens).
- Held-out perplexity: **{perplexity:.2f}** a token (bf16 weights, float32 arithmetic, windows of
  up to 512 tokens that do not overlap).
- Training: {tokens:,} tokens ({epochs:.1f} epochs) in float32 on {hardware}, by
  `python serving_examples/train_tiny_model.py --text kjv.txt --out serving_examples/tiny-llama
  --minutes {minutes:g} --device {device}`.
- Licence: CC0-1.0.

Greedy continuations:

{samples}
"""


def read_chapters(path: Path) -> tuple[list[str], str]:
    """The chapters to train on and the held-out text, one verse a line, without references."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        verse = VERSE.fullmatch(line.strip())
        if verse is None:
            raise SystemExit(f"{path}:{number}: not a verse such as 'Ge1:1 In the ...': {line!r}")
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["words"])
    train: list[str] = []
    heldout: list[str] = []
    for (book, _), verses in chapters.items():
        (heldout if book == HELDOUT else train).append("\n".join(verses))
    return train, "\n".join(heldout) + "\n"


def train_tokenizer(chapters: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(chapters, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])


def batches(ids: torch.Tensor, context: int) -> Iterator[torch.Tensor]:
    """Endless batches of windows: each epoch cuts the text at another offset and shuffles."""
    rows = BATCH_TOKENS // context
    while True:
        start = int(torch.randint(context, ()))
        windows = ids[start : start + (len(ids) - start) // context * context].view(-1, context)
        windows = windows[torch.randperm(len(windows))]
        yield from windows[: len(windows) // rows * rows].split(rows)


def train(model: LlamaForCausalLM, ids: torch.Tensor, minutes: float) -> int:
    """Train until the time is over: linear warm-up, then cosine to zero. Returns tokens seen.

    Muon trains the matrices of the layers, AdamW the embedding and the norms. For the first 80 %
    of the time the windows have half the context, which is cheaper; then all of it.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    embedding = model.get_input_embeddings().weight
    adamw = [{"params": [embedding], "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizers: tuple[torch.optim.Optimizer, ...] = (
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, betas=(0.9, 0.98)),
    )
    short, full = batches(ids, CONTEXT // 2), batches(ids, CONTEXT)
    began, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        rate = RATE * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * done))
        batch = next(short if done < 0.8 else full).to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"{done:4.0%}  step {step:5}  loss {loss.item():.3f}", flush=True)
        step += 1
        done = (time.monotonic() - began) / (60 * minutes)
    return step * BATCH_TOKENS


@torch.inference_mode()
def heldout_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean loss in nats a token; the first token of a window is not predicted."""
    windows = [w[None] for w in ids.to(model.device).split(CONTEXT)]
    total = sum(model(input_ids=w, labels=w).loss.item() * (w.numel() - 1) for w in windows)
    return float(total) / (len(ids) - len(windows))


@torch.inference_mode()
def continue_greedily(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=60)
        yield "> " + tokenizer.decode(output[0], skip_special_tokens=True).replace("\n", "  \n> ")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny Llama from the King James Bible.")
    parser.add_argument("--text", type=Path, required=True, help="output of `bible -f`")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=30, help="training time (30)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (cpu)")
    args = parser.parse_args()
    torch.manual_seed(0)

    train_text, heldout_text = read_chapters(args.text)
    tokenizer = train_tokenizer(train_text)
    ids = encode(tokenizer, [f"{BOS}{chapter}{EOS}" for chapter in train_text])
    config = LlamaConfig(**SHAPE, bos_token_id=ids[0].item(), eos_token_id=ids[-1].item())
    model = LlamaForCausalLM(config).to(args.device)
    tokens = train(model, ids, args.minutes)

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    heldout_file = args.out.with_name(f"{args.out.name}-heldout.txt")
    heldout_file.write_text(heldout_text, encoding="utf-8")

    model.float().eval()  # the bf16 values, float32 arithmetic
    heldout = encode(tokenizer, [heldout_text])
    card = MODEL_CARD.format(
        parameters=model.num_parameters(),
        architecture=", ".join(f"{name} {value}" for name, value in SHAPE.items()),
        heldout_name=heldout_file.name,
        heldout_tokens=len(heldout),
        perplexity=math.exp(heldout_loss(model, heldout)),
        tokens=tokens,
        epochs=tokens / len(ids),
        minutes=args.minutes,
        hardware=f"{torch.get_num_threads()} CPU threads"
        if args.device == "cpu"
        else torch.cuda.get_device_name(),
        device=args.device,
        samples="\n\n".join(continue_greedily(model, tokenizer)),
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
