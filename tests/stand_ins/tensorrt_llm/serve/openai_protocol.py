"""Read as a text, to see what the build's requests have."""


class ChatCompletionRequest:
    priority: float | None = None
