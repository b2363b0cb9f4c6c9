"""The engine: token ids in, token ids out, one batch of rows a step. Knows neither text nor transport."""
