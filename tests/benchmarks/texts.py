#!/usr/bin/env python3
"""What each part of the sentiment task costs on real reviews, and the same network as usual:

    python tests/benchmarks/texts.py --data-dir data

Usual: batches drawn at random, padded by pad_sequence, packed by pack_padded_sequence into one
nn.LSTM(num_layers=2, bidirectional=True), float32, Adam. Both train on the same reviews with the
same numbers of units and the same longest text; tokens are words of the reviews, padding not
counted. The two take turns, and the median of their rates counts.
"""
import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import deep_learning_deliverable as dld  # noqa: E402


class Usual(nn.Module):
    """Embedding, packed bidirectional LSTM, additive attention, linear."""

    def __init__(self, words, width, dropout):
        super().__init__()
        size = dld.WORD_DIM + dld.PAIR_DIM  # as many as the program's words and word pairs have
        self.embedding = nn.Embedding(words, size, padding_idx=0)
        self.lstm = nn.LSTM(size, width, 2, batch_first=True, bidirectional=True, dropout=dropout)
        self.score = nn.Sequential(nn.Linear(2 * width, 128), nn.Tanh(),
                                   nn.Linear(128, 1, bias=False))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, ids, length):
        packed = pack_padded_sequence(self.drop(self.embedding(ids)), length, batch_first=True,
                                      enforce_sorted=False)
        h, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        h = self.drop(h)
        weight = self.score(h).squeeze(-1).masked_fill(ids == 0, -torch.inf).softmax(1)
        return self.head((weight.unsqueeze(1) @ h).squeeze(1))


def rate_of(step, batches):
    """Tokens a second over these batches."""
    started = time.perf_counter()
    tokens = sum(step(batch) for batch in batches)
    return tokens / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, default=20, help="a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    def timed(name, job):
        started = time.perf_counter()
        done = job()
        peak = dld.peak_memory_mb(machine) or 0
        print(f"{name:58} {time.perf_counter() - started:7.1f} s, at most {peak:,.0f} MB so far",
              flush=True)
        return done

    config = dld.resolve_config({"task": "sentiment", "data": "real", "data_dir": args.data_dir,
                                 "wide": False})
    machine = dld.start_machine(config)
    raw = timed("reading the reviews (with the kept words, if there)",
                lambda: dld.read_imdb(config))
    data = timed("splitting, vocabulary, numbering", lambda: dld.build_dataset(raw, config))
    train, samples, labels = data.parts["train"], data.samples, data.labels
    model = dld.build_model(data.meta).train()
    few = dataclasses.replace(data, unlabelled=data.unlabelled[:0])
    timed("word vectors and leanings", lambda: samples.prepare(model, few, machine))

    def learn(longest, table, slots=0):
        return dld.PhraseModel(samples.tokens, table, int(table.max()) + 1, train, labels[train], 2,
                               longest, slots)

    every = torch.arange(len(samples.tokens.words)) + dld.UNKNOWN + 1
    simple = timed("baseline: learning", lambda: learn(2, every))
    timed("baseline: the test part", lambda: simple.probabilities(data.parts["test"]))
    simple = timed("wide part: learning", lambda: learn(3, samples.table, 2**18))
    timed("pseudo-labels: 50,000 reviews", lambda: simple.probabilities(data.parts["unlabelled"]))

    order = torch.Generator().manual_seed(0)
    plan = samples.plan(train, config.batch_size, order)
    kept = samples.kept[train]
    held = sum(len(where) * int(samples.flat_indices(train[where])[0].shape[1]) for where in plan)
    print(f"\nlongest text {config.max_tokens}, batches of {config.batch_size}, "
          f"{kept.sum():,} tokens an epoch; padding {1 - int(kept.sum()) / held:.1%}")
    at_random = torch.randperm(len(train), generator=order).split(config.batch_size)
    padded = sum(len(where) * int(kept[where].max()) for where in at_random)
    print(f"padding with batches drawn at random: {1 - int(kept.sum()) / padded:.1%}")

    state = dld.new_train_state(model, config, machine)

    def ours(where):
        rows = train[where]
        with machine.autocast():
            logits = model(samples.batch(rows))
        state.optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), labels[rows]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        state.optimizer.step()
        return int(samples.kept[rows].sum())

    usual = Usual(len(data.meta["vocabulary"]) + 2, config.width, config.dropout).train()
    optimizer = torch.optim.Adam(usual.parameters())
    cut = [samples.batch(row.view(1))[0, :int(samples.kept[row])].long()
           for row in train[torch.cat(at_random[:100])]]

    def usually(batch):
        rows, ids = batch
        length = torch.tensor([len(text) for text in ids])
        logits = usual(pad_sequence(ids, batch_first=True), length)
        loss = nn.functional.cross_entropy(logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return int(length.sum())

    size = config.batch_size
    rounds = [[], []]
    others = [(train[where], cut[i * size:(i + 1) * size])
              for i, where in enumerate(at_random[:100])]
    rate_of(ours, plan[:5])
    rate_of(usually, others[:3])
    for i in range(args.rounds):
        some = slice(i * args.steps, (i + 1) * args.steps)
        rounds[0].append(rate_of(ours, plan[some]))
        rounds[1].append(rate_of(usually, others[:args.steps]))
    here, there = map(statistics.median, rounds)
    print(f"\nthis program {here:10,.0f} tokens/s   an epoch takes {int(kept.sum()) / here:.0f} s "
          f"({min(rounds[0]):,.0f} to {max(rounds[0]):,.0f})")
    print(f"usual script {there:10,.0f} tokens/s   an epoch takes {int(kept.sum()) / there:.0f} s "
          f"({min(rounds[1]):,.0f} to {max(rounds[1]):,.0f})")
    print(f"{here / there:.2f} times the tokens a second")
    print(f"{machine.describe()}, torch {torch.__version__}, Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
