"""What a federation's server records of a round: scores, costs, and who was rejected."""

from collections.abc import Sequence
from dataclasses import replace

from fedalt.engine.record_lines import score_line, train_line
from fedalt.engine.round import ClientRound
from fedalt.federation.owner_messages import Say
from fedalt.federation.round_collector import RoundCollector
from fedalt.runs.folder import RunFolder


def record(
    folder: RunFolder, say: Say, collector: RoundCollector, clients: Sequence[ClientRound]
) -> set[str]:
    """Record scores and training of a round; who was rejected, of whom no score is recorded."""
    rejected = {client.client_id for client in clients if client.refused is not None}
    for client_id in sorted(collector.answers.keys() - rejected):
        for score in collector.answers[client_id].scores:
            about = score.split, score.round, client_id, score.column
            folder.record(score_line(*about, score.metrics))
    for client in clients:
        if client.refused is not None:
            say(f"round {collector.round + 1}: {client.client_id}: refused: {client.refused}")
        answer = collector.answers[client.client_id]
        for cost in answer.costs:
            trained = replace(client, seconds=cost.seconds, metrics=cost.metrics)
            if cost.column != "own":  # the baseline sends and receives nothing
                trained = replace(trained, upload_bytes=0, download_bytes=0)
            line = train_line(collector.round, cost.column, trained, trained=answer.round)
            folder.record(line)
    return rejected
