"""Where `python -m convert` is found when it is run in the repository; the code is `coreinfer_jax.io.conversion`."""
