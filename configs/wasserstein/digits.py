"""Nine forward processes on scikit-learn's 8×8 digits: those of configs/wasserstein/cifar10.py, σ up to 10.

python main.py --config=configs/wasserstein/digits.py:ve_v1 --workdir=runs/digits_ve_v1 --mode=train
python main.py --config=configs/wasserstein/digits.py:ve_v1 --workdir=runs/digits_ve_v1 --mode=eval

`python -m wasserstein_example.digits --workdir=W` trains all of them and draws FID against the number of sampling
steps; the expected numbers are in wasserstein_example/README.md.
"""

from configs import presets
from configs.digits import get_config as digits_config
from configs.fields import apply, choose
from configs.wasserstein.cifar10 import MODELS, VP

CHANGES = {
    "model": dict(ema_rate=0.999, parameterization="unconstrained"),
    "training": dict(n_iters=1000, eval_freq=500, snapshot_freq=0, snapshot_freq_for_preemption=250),
    "training.snapshot_sampling": False,
    # The sampler that the theory analyses; for VE it is reverse diffusion.
    "sampling": dict(predictor="exponential_integrator", corrector="none"),
    "eval": dict(batch_size=500, enable_bpd=False, enable_asymmetry=False),
}


def get_config(model="ve"):
    return choose(apply(digits_config(), presets.VP if model in VP else {}, CHANGES), model, MODELS)
