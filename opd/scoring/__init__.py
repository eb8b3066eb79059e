"""Both models' log-probabilities of sampled responses, and the loss from hidden states."""
