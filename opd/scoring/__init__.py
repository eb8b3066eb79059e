"""Log-probabilities of both models on sampled responses, and the loss from hidden states."""
