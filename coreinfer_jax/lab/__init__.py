"""Studies of core neurons, above everything else: evaluation, analysis, clustering, training."""
