"""The OpenAI dialect, `/v1`: the same datasets, jobs and models under the names that OpenAI's clients use."""
