"""The benchmark of whole models: Tilewright beside the field, interleaved, judged by ratios.

Why a package: each question has its module. Which cells and limits (`cells`), which models
(`models`), which systems (`systems`), how a system runs (`worker`, `engines`), how it is asked
(`client`), whether the machine held still (`gate`), in which order (`rounds`), what the numbers
mean (`intervals`), whether the answers are right (`accuracy`), and what a reader sees (`table`,
`report`).

Run as `./dev bench models`. Tested by tests/python/test_bench_models.py.
"""
