"""Attention data parallelism: each group of tp ranks has requests of its own, and all ranks share everything else.

One engine and one residual stream. The invariant, in three sentences:

- Every rank holds the residual stream of all groups' tokens, in the order of the groups; what is not attention runs on
  it as without groups.
- Attention of a rank sees the rows of its own group alone, and its cache holds blocks of that group's requests alone: a
  block id means something within its group only.
- All ranks take part in every collective of a step, in the same order, whether or not their group has work.

`scheduler.py` is vLLM's scheduler once for each group (set through `scheduler_cls`), `routing.py` says which group gets
a request, `executor.py` carries one step to the workers and the groups' answers back, `worker.py` runs a worker's own
group's step, `stream.py` is the tensors' part, `checks.py` what is set and refused before anything starts; how many
groups there are is in `titan_bridge/policy/attention_dp.py`, which needs no vLLM.
"""
