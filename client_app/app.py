"""Flower ClientApp: answers queries about the node, trains and evaluates."""

from collections.abc import Callable
from dataclasses import replace
from logging import getLogger
from typing import cast

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client_app.images import SiteError, names_kept_here
from client_app.model_inbox import ModelInbox
from client_app.node_log import described, logging_to_site
from client_app.own_site import OwnSite, data_folder
from client_app.round import evaluate_round, train_round
from client_app.secure_sum import SecureParty
from client_app.site_ledger import Kind
from client_app.site_policy import SiteRefusal, is_real_site, one_line
from clip2fl_common import messages
from clip2fl_common.config import SITES, RunConfig
from clip2fl_common.data.datasets import DatasetError, open_site
from clip2fl_common.messages import TrainRequest
from clip2fl_common.messages.secure import (
    COMMIT,
    KEYS,
    REVEAL,
    SecureRequest,
    is_of_evaluation,
)
from clip2fl_common.provenance import versions_here
from clip2fl_common.secure.statements import EVALUATION, SecureError
from clip2fl_common.site_names import NAME_RULE, is_site_name

logger = getLogger(__name__)

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    """Return which simulated partition, or which site, this node is."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        if site is not None:
            name = _site_name(context)
            open_site(config.dataset, site.folder)
            return messages.site_reply(
                name, versions_here(), site.policy.listed_in_card
            )
        place = MetricRecord(
            {messages.PARTITION: cast(int, context.node_config["partition-id"])}
        )
        return RecordDict({messages.METRICS: place})

    return _answer(message, context, "query", answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's images."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        request = TrainRequest.parse(message.content)
        if site is not None:
            site.spend(config, request.fields)

        def trained() -> RecordDict:
            return train_round(config, request, site)

        if not config.aggregation.secure:
            return trained()
        party = SecureParty.of(config, str(context.run_id), site, request.partition)
        return party.train(message.content, request, trained)

    return _answer(message, context, "train", answer)


@app.train(KEYS)
def keys(message: Message, context: Context) -> Message:
    """Return this client's public key for a secure sum."""
    # The evaluation of a round that was counted; the request to evaluate counts too.
    kind: Kind = "finish" if is_of_evaluation(message.content) else "query"
    return _exchange(message, context, kind, SecureParty.keys)


@app.train(COMMIT)
def commit(message: Message, context: Context) -> Message:
    """Sign the set of clients whose updates are summed."""
    return _exchange(message, context, "finish", SecureParty.commit)


@app.train(REVEAL)
def reveal(message: Message, context: Context) -> Message:
    """Reveal the seeds of the masks that do not cancel in the sum."""
    return _exchange(message, context, "finish", SecureParty.reveal)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return the accuracy of each classifier on a site's validation images."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        request = TrainRequest.parse(message.content)

        def evaluated() -> messages.Evaluation:
            return evaluate_round(config, request, site)

        if not config.aggregation.secure:
            return evaluated().content()
        party = SecureParty.of(
            *(config, str(context.run_id), site, request.partition), EVALUATION
        )
        return party.evaluate(message.content, request, evaluated)

    return _answer(message, context, "evaluate", answer)


@app.query(messages.MODEL_ACTION)
def model(message: Message, context: Context) -> Message:
    """Take a piece of the delivered model, if the site's policy names a folder for it.

    The answer says nothing about the site's images, so no budget counts it.
    """
    with logging_to_site(context.node_config, context.run_id, "model", None):
        try:
            with names_kept_here(context.node_config):
                inbox = ModelInbox.of(context.node_config)
                inbox.check_request(messages.message_bytes(message.content))
                name = _site_name(context)
                answer = inbox.take(messages.ModelOffer.parse(message.content))
                logger.info("%s, %.2f MB are here", answer.state, answer.next / 1e6)
                return Message(replace(answer, site=name).content(), reply_to=message)
        except SiteRefusal as refusal:
            logger.error("refused: %s", refusal)
            error = Error(messages.SITE_REFUSES, refusal.sent)
            return Message(error, reply_to=message)


def _exchange(
    message: Message,
    context: Context,
    kind: Kind,
    step: Callable[[SecureParty, SecureRequest], RecordDict],
) -> Message:
    """Return the answer to one of the other exchanges of secure aggregation."""

    def answer(config: RunConfig, site: OwnSite | None) -> RecordDict:
        request = SecureRequest.parse(message.content)
        party = SecureParty.of(
            *(config, str(context.run_id), site, request.partition), request.purpose
        )
        return step(party, request)

    return _answer(message, context, kind, answer)


def _answer(
    message: Message,
    context: Context,
    kind: Kind,
    answer: Callable[[RunConfig, OwnSite | None], RecordDict],
) -> Message:
    """Return a handler's answer, unless one of the site's own rules forbids it."""
    settings = message.content.config_records.get(messages.CONFIG, ConfigRecord())
    server_round = settings.get(messages.ROUND)
    with logging_to_site(
        context.node_config,
        context.run_id,
        kind,
        server_round if isinstance(server_round, int) else None,
    ):
        return _logged_answer(message, context, kind, answer)


def _logged_answer(
    message: Message,
    context: Context,
    kind: Kind,
    answer: Callable[[RunConfig, OwnSite | None], RecordDict],
) -> Message:
    try:
        with names_kept_here(context.node_config):
            size = messages.message_bytes(message.content)
            logger.info("asked, %.2f MB", size / 1e6)
            site = OwnSite.of(context.node_config)
            config = RunConfig.from_run_config(context.run_config)
            if site is not None:
                config = site.admit(
                    config,
                    kind=kind,
                    run=str(context.run_id),
                    request_bytes=size,
                )
            elif config.dataset.name == SITES:
                data_folder(context.node_config)  # raises: the site has no data folder
            content = answer(config, site)
            if site is not None:
                size = messages.message_bytes(content)
                site.check_reply(size)
                metrics = content.metric_records.get(messages.METRICS)
                logger.info("%s", described(metrics, size))
            return Message(content, reply_to=message)
    except SiteRefusal as refusal:
        logger.error("refused: %s", refusal)
        error = Error(messages.SITE_REFUSES, refusal.sent)
    except SecureError as refusal:
        logger.error("run %d, %s: %s", context.run_id, kind, refusal)
        error = Error(messages.SITE_REFUSES, one_line(str(refusal)))
    except DatasetError as found:
        logger.error("images: %s", found)
        told = f"{type(found).__name__}: {found}"
        if is_real_site(context.node_config):
            told = found.summary
        error = Error(messages.DATA_ERROR, told)
    except FloatingPointError as diverged:
        logger.error("training has diverged: %s", diverged)
        # This code tells the server that the model that it sent may be at fault.
        error = Error(messages.DIVERGED, messages.plain(diverged))
    except Exception as failed:
        cause = failed.__cause__ or failed
        logger.error("failed: %s: %s", type(cause).__name__, cause)
        raise
    return Message(error, reply_to=message)


def _site_name(context: Context) -> str:
    """Return the site's name from the node configuration; empty without one.

    A server with a registry of sites knows the name without it.
    """
    name = context.node_config.get("site")
    if name is None:
        return ""
    if not is_site_name(name):
        raise SiteError(f"site in the node's --node-config must be {NAME_RULE}")
    return name
