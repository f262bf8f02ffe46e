"""Who continues a conversation: verl's own rollout servers in Ray, as a training run has them, or an endpoint.

Both are what the agent loop calls a server manager: `generate(request_id, prompt_ids, sampling_params)`, tokens in and
tokens out. An endpoint that only has texts is asked for them, and what that loses is said (`Endpoint.lost`).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import aiohttp
import ray
from omegaconf import DictConfig, OmegaConf
from verl.workers.rollout.replica import TokenOutput

from recipe.gtpo.run.ending import end_on_sigterm
from recipe.gtpo.run.errors import ConfigError, one_line
from recipe.gtpo.run.record import RunRecord
from recipe.gtpo.run.watchdog import ActorWatch

# -- verl's servers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_ray(config: DictConfig, record: RunRecord) -> Iterator[None]:
    """Ray with the settings that verl starts it with for a training run."""
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    section = config.ray_kwargs.ray_init
    runtime_env = OmegaConf.merge(get_ppo_ray_runtime_env(config), section.get("runtime_env") or {})
    ray.init(**OmegaConf.to_container(OmegaConf.create({**section, "runtime_env": runtime_env}), resolve=True))
    end_on_sigterm(record)
    try:
        yield
    finally:
        ray.shutdown()


async def start_servers(config: DictConfig) -> Any:
    """verl's manager of servers of their own: no trainer, the weights are those of `actor_rollout_ref.model.path`."""
    from verl.workers.rollout.llm_server import LLMServerManager

    rollout, trainer = config.actor_rollout_ref.rollout, config.trainer
    rollout.nnodes, rollout.n_gpus_per_node = trainer.nnodes, trainer.n_gpus_per_node
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the addresses
        return await LLMServerManager.create(config)


async def watch(manager: Any, record: RunRecord, config: DictConfig) -> None:
    """Raises RuntimeError when a server dies, or loses its engine; never returns."""
    parts = [("rollout server", server) for replica in manager.get_replicas() for server in replica.servers]
    parts.append(("balancer of the rollout servers", manager.global_load_balancer))
    seconds = config.watchdog.poll_seconds
    actors = ActorWatch(parts, record, seconds, config.watchdog.engine_seconds)  # asked here: its thread would end us
    while True:
        await asyncio.sleep(seconds)
        dead = await asyncio.get_running_loop().run_in_executor(None, actors.find_dead)
        if dead is not None:
            raise RuntimeError(dead)


# -- an endpoint ------------------------------------------------------------------------------------------------------

_SECONDS = 1800.0  # of one turn
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before another try, of what is busy or was cut off
_BUSY = (429, 502, 503, 504)
#: What is no part of OpenAI's completions. vLLM has all of it; most servers pass over a word that they do not know.
_EXTRAS = {"return_token_ids": True, "skip_special_tokens": False, "add_special_tokens": False}


class Refused(RuntimeError):
    """The endpoint said no: its status and its words."""


class Endpoint:
    """An OpenAI-compatible endpoint (`/v1/completions`) in the place of verl's server client.

    The chat template is applied here, with the model's own tokenizer: the endpoint continues tokens. One probe says
    what it can do.

    Args:
        url: up to and with `/v1`.
        model: the name that it serves; None: its only one.
        tokenizer: of the model that it serves.
        turn_end: the token that ends a turn, for an endpoint that does not hand out tokens.
        key_env: environment variable with a bearer token.
    """

    def __init__(
        self, url: str, model: str | None, tokenizer: Any, turn_end: int | None, key_env: str | None = None
    ) -> None:
        self.url, self.model = url.rstrip("/"), model
        self.takes_ids = self.gives_ids = self.takes_extras = True
        self._tokenizer, self._turn_end = tokenizer, turn_end
        key = os.environ.get(key_env) if key_env else None
        if key_env and not key:
            raise ConfigError(f"api_key_env={key_env}: this environment variable is not set")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session: aiohttp.ClientSession | None = None
        self.requests = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Endpoint:
        timeout = aiohttp.ClientTimeout(total=_SECONDS, sock_connect=30)
        self._session = aiohttp.ClientSession(
            headers=self._headers, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)
        )
        try:
            self.model = self.model or await self._only_model()
            await self._probe()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    async def _only_model(self) -> str:
        try:
            found = [one["id"] for one in (await self._ask("GET", "models", None))["data"]]
        except (Refused, OSError, aiohttp.ClientError, asyncio.TimeoutError, KeyError, TypeError) as e:
            raise ConfigError(f"endpoint={self.url} does not answer GET /models: {one_line(e)}") from e
        if len(found) != 1:
            raise ConfigError(
                f"endpoint={self.url} serves {', '.join(found) or 'nothing'}: served_model=NAME says which"
            )
        return found[0]

    async def _probe(self) -> None:
        """Find out, with a token each, whether it takes tokens, whether it gives them, and which words it refuses."""
        ids = self._tokenizer.encode("1 2", add_special_tokens=False)
        refusal: Exception | None = None
        for self.takes_ids, self.takes_extras in ((True, True), (True, False), (False, True), (False, False)):
            try:
                said = await self._complete(ids, {"max_tokens": 1})
            except Refused as e:
                refusal = refusal or e
                continue
            except (OSError, aiohttp.ClientError, asyncio.TimeoutError) as e:
                raise ConfigError(f"endpoint={self.url} does not answer: {one_line(e)}") from e
            self.gives_ids = isinstance(said.get("token_ids"), list)
            return
        raise ConfigError(f"endpoint={self.url} does not serve POST /completions for {self.model}: {refusal}")

    @property
    def lost(self) -> list[str]:
        """What an evaluation over this endpoint has not got that one with verl's servers has."""
        found = []
        if not self.takes_ids:
            found.append("it takes prompts as text: what it makes of them may be other tokens than the chat template's")
        if not self.gives_ids:
            found.append(
                "it answers in text, which is made into tokens again here: their number, and what the next turn begins "
                "with, may differ from what was sampled; a turn's end is taken from finish_reason"
            )
        if not self.takes_extras:
            found.append("it refuses words beyond OpenAI's: no top_k, no stop tokens of the chat template")
        return found

    # -- one turn -----------------------------------------------------------------------------------------------------

    async def generate(
        self, request_id: str, *, prompt_ids: Sequence[int], sampling_params: Mapping[str, Any], **_: Any
    ) -> TokenOutput:
        """Continue the tokens. Raises Refused, OSError or TimeoutError: the agent loop counts a lost trajectory."""
        choice = await self._complete(prompt_ids, sampling_params)
        reason = choice.get("finish_reason")
        if self.gives_ids:
            return TokenOutput(token_ids=choice["token_ids"], stop_reason=reason)
        ids = self._tokenizer.encode(choice["text"], add_special_tokens=False)
        ids = ids[: sampling_params["max_tokens"] - (reason == "stop")]
        if reason == "stop" and self._turn_end is not None:
            ids.append(self._turn_end)
        return TokenOutput(token_ids=ids, stop_reason=reason)

    async def _complete(self, ids: Sequence[int], params: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice of the answer."""
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        body: dict[str, Any] = {"model": self.model, "prompt": list(ids) if self.takes_ids else text}
        body |= {name: params[name] for name in ("max_tokens", "temperature", "top_p", "seed") if name in params}
        if self.takes_extras:
            body |= _EXTRAS
            body |= {name: params[name] for name in ("stop_token_ids",) if name in params}
            if params.get("top_k", -1) > 0:
                body["top_k"] = params["top_k"]
        said = await self._ask("POST", "completions", body)
        try:
            return said["choices"][0]
        except (KeyError, IndexError, TypeError) as e:
            raise Refused(f"an answer without choices: {str(said)[:200]}") from e

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The JSON of an answer. Tries again where the endpoint is busy or the connection breaks."""
        assert self._session is not None
        for wait in (*_WAITS, None):
            self.requests += 1
            try:
                async with self._session.request(method, f"{self.url}/{path}", json=body) as response:
                    if response.status == 200:
                        return await response.json(content_type=None)
                    said = " ".join((await response.text()).split())[:200]
                    if wait is None or response.status not in _BUSY:
                        raise Refused(f"{response.status} {said}")
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                # a server that was never reached does not come to be by waiting
                if wait is None or self.requests == 1:
                    raise
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")
