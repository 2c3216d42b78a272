"""Model cards, filled from a model's own records."""

from living_moe.model_cards.card import CardRecords, LineageSummary, ParameterCounts, Perplexity, build_model_card

__all__ = ["CardRecords", "LineageSummary", "ParameterCounts", "Perplexity", "build_model_card"]
