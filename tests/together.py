"""Trains on pictures and on texts for one epoch, in several processes and then in one.

    python tests/together.py OUT 3

The processes are forks of one, so that libraries are loaded once; they find what torchrun would
tell them. test_processes.py compares what they write.
"""
import os
import socket
import sys

import torch
import torch._dynamo  # which every process would else load by itself
from conftest import dld, small

RAW = {"cifar10": dld.make_shapes(300, 50), "sentiment": dld.make_reviews(300, 50)}


def one_epoch(task, group):
    """Weights, history and the samples that each process trained on."""
    config = small(task, limit=161, epochs=1, batch_size=50, dropout=0.0, word_dropout=0.0)
    machine = dld.start_machine(config, group)
    data = dld.build_dataset(RAW[task], config)
    state, _ = dld.start_training(data, config, machine)
    seen, batch = [], data.samples.batch

    def noted(rows, noise=None, epoch=0, shard=slice(None)):
        seen.extend(rows[shard].tolist() if noise is not None else [])
        return batch(rows, noise, epoch, shard)

    data.samples.batch = noted
    dld.fit(state, dld.Context(config, data, machine, dld.Checkpointer()))
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in state.history]
    every = sorted(row for some in group.gather(seen) for row in some)
    return {"weights": dict(state.model.state_dict()), "history": history, "seen": every,
            "logits": state.best_logits, "train": data.parts["train"].tolist()}


def join(rank, size, port, out):
    """One of several processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    group = dld.join_group()
    torch.set_num_threads(1)
    found = {"together": {task: one_epoch(task, group) for task in RAW}}
    dld.leave_group()
    if group.is_leader:
        found["alone"] = {task: one_epoch(task, dld.DistributedContext()) for task in RAW}
        torch.save(found, out)


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, size = sys.argv[1], int(sys.argv[2])
    torch.multiprocessing.start_processes(join, (size, port, out), size, start_method="fork")
