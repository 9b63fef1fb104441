"""The gateway: what takes requests to the models, in the API's process and in processes of its own."""
