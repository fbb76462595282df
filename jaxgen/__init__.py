"""jaxgen: train, sample and measure generative models in JAX."""


def __getattr__(name: str):
    if name == "train":  # on first use, since it brings JAX with it
        from jaxgen.experiment import train

        return train
    raise AttributeError(f"module 'jaxgen' has no attribute '{name}'")
