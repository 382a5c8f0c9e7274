"""Trains each task for one epoch, alone or as one of several processes, and writes what came out: see test_processes.

    python tests/together.py OUT 2 cifar10 mnist

The processes are forks of one, so that libraries are loaded once; they find what torchrun would tell them.
"""
import os
import socket
import sys
from pathlib import Path

import torch
from conftest import dld, small

TASKS = {"cifar10": lambda: dld.make_shapes(500, 100), "mnist": dld.make_digits,
         "sentiment": lambda: dld.make_reviews(600, 100)}


def one_epoch(task, world, **settings):
    """Weights, history and the samples that each process trained on."""
    config = small(task, limit=400, epochs=1, dropout=0.0, **settings)
    runtime = dld.start_runtime(config, world)
    data = dld.build_data(TASKS[task](), config)
    state, _ = dld.begin(data, config, runtime)
    seen, batch = [], data.samples.batch
    data.samples.batch = lambda rows, noise=None, epoch=0, part=slice(None): (
        seen.extend(rows[part].tolist() if noise is not None else []), batch(rows, noise, epoch, part))[1]
    dld.fit(state, data, config, runtime, lambda state: None)
    history = [{k: v for k, v in row.items() if k != "seconds"} for row in state.history]
    every = sorted(row for some in world.gather(seen) for row in some)
    return {"weights": dict(state.model.state_dict()), "history": history, "seen": every,
            "logits": state.best_logits, "train": data.parts["train"].tolist()}


def join(rank, size, port, out, tasks):
    """One of several processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = dld.join_world()
    torch.set_num_threads(1)
    found = {task: one_epoch(task, world) for task in tasks}
    if world.leader:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def main():
    out, size, tasks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            join(rank, size, port, out, tasks)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main()
