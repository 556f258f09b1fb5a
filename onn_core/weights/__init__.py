"""A model folder, and the stream that fetches its weights into slots."""
