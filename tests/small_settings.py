"""Settings of models so small that a run takes about a second, with every kind of step in it."""

PLANE = {
    "data.num_train": 200,
    "data.num_test": 60,
    "training.batch_size": 50,
    "training.n_iters": 6,
    "training.log_freq": 2,
    "training.save_freq": 3,
}
BRIDGE = {
    "bridge.num_ipf": 2,
    "bridge.num_steps": 5,
    "model.width": 8,
    "model.depth": 1,
    "training.n_iters": 10,
    "training.batch_size": 8,
    "training.cache_size": 32,
    "training.refresh_freq": 4,
    "training.log_freq": 5,
    "training.save_freq": 3,
    "evaluation.num_samples": 20,
    "evaluation.num_sets": 2,
    "evaluation.batch_size": 12,
}
