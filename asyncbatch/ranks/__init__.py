"""More than one GPU: a model that transformers has sharded over several processes (ranks), started by torchrun.

Each rank has its own batcher and schedules the same batches; one of them, the leader, takes the requests. There is no
runtime here: torchrun starts the ranks, torch.distributed connects them, transformers shards the model.
"""
