"""GPUs that are not there: a CPU build of PyTorch runs samft's CUDA code, with real numbers.

    PYTHONPATH=.:tests python -m helpers.pretend_cuda samft.train ARGUMENTS...

A tensor on "cuda" is a subclass whose device is CUDA for C++ as well, so that autocast's rules for
CUDA, autograd's device threads, DistributedDataParallel's reducer, GradScaler and fused optimizers
are the real ones; its values lie in a CPU tensor. On top of that:

    device_rules    operations that mix devices raise as on a GPU; those that make the host wait
                    are listed with the line of code that did it
    determinism     operations that CUDA refuses while deterministic algorithms are on
    streams         copies to the host hold garbage until something has waited for them
    numerics        TF32 where it is allowed; what only CUDA kernels take
    graphs          CUDA graphs, captured and replayed
    launches        how many kernels a step launches, about
    ledger          where all of it is written down, one report for each process
    runs            a command in the harness, for tests

What it cannot show: kernels and their choice, speed, races on the device, NCCL, torch.compile.
`devices.cpp` is compiled once for each version of PyTorch, which needs g++.
"""
