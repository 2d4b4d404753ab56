"""The demo's reward: how positive a response sounds, by VADER's lexicon. No model, no network."""

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str], **fields: list) -> list[float]:
    """VADER's compound score of each completion: -1 (most negative) to 1 (most positive)."""
    return [analyzer.polarity_scores(completion)["compound"] for completion in completions]
