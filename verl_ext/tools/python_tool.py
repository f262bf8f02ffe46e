"""The tool `python` for any verl agent loop: runs code on a tool server (`verl_ext.tool_server`) through its client.

Use it through a tool config like `recipe/gtpo/config/tools/python.yaml`. Code never runs in the Ray worker.
"""

from __future__ import annotations

from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import (
    OpenAIFunctionParametersSchema,
    OpenAIFunctionPropertySchema,
    OpenAIFunctionSchema,
    OpenAIFunctionToolSchema,
    ToolResponse,
)

from verl_ext.tool_server import ToolClient
from verl_ext.tools.schema import python_schema


class LimitedString(OpenAIFunctionPropertySchema):
    """verl's property schema has no `maxLength`; dump with `serialize_as_any=True` to see it."""

    maxLength: int | None = None


class PythonTool(BaseTool):
    """Stateless Python execution.

    Config (the tool's `config` mapping; anything else raises):
        type: verl's tool type, "native".
        backend: "http" (default): a tool server at `url`; "sandbox_fusion": any SandboxFusion service at `url`,
            which shows no value of a last expression; "ray": one executor on every node of the training run's own
            cluster, no URL.
        url: the tool server, e.g. http://127.0.0.1:8000; "ray" or "ray://strong" is backend "ray" with that isolation.
        token: bearer token, where the server asks for one.
        away_seconds: for how long a call looks for a server at `url` that cannot be reached, as it starts again
            (default: 60); then the call is "infra".
        timeout: wall seconds for one execution; default: the server's limit; of "sandbox_fusion" 10.
        max_code_chars: longest `code` the schema allows; default: the server's limit only.
        error_lines: show only the last so many lines of a failure (1 = just "NameError: ..."); default: all.
    """

    _KEYS = frozenset({"type", "backend", "url", "token", "away_seconds", "timeout", "max_code_chars", "error_lines"})
    _BACKENDS = ("http", "sandbox_fusion", "ray")

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | None = None) -> None:
        unknown = sorted(set(config) - self._KEYS)
        if unknown:
            raise ValueError(f"PythonTool: unknown config key {unknown[0]!r}; known: {', '.join(sorted(self._KEYS))}")
        self._backend = config.get("backend", "http")
        if self._backend not in self._BACKENDS:
            raise ValueError(f"PythonTool: unknown backend {self._backend!r}; known: {', '.join(self._BACKENDS)}")
        if self._backend != "ray" and not config.get("url"):
            raise ValueError("PythonTool: config.url is empty: start a server (`python -m verl_ext.tool_server`)")
        echo = self._backend != "sandbox_fusion"
        super().__init__(config, tool_schema or self._schema(config.get("max_code_chars"), echo))
        self._client: ToolClient | None = None

    @staticmethod
    def _schema(max_code_chars: int | None, echo: bool = True) -> OpenAIFunctionToolSchema:
        function = python_schema(max_code_chars, echo=echo)["function"]
        parameters = function["parameters"]
        properties = {name: LimitedString(**rule) for name, rule in parameters["properties"].items()}
        return OpenAIFunctionToolSchema(
            type="function",
            function=OpenAIFunctionSchema(
                name=function["name"],
                description=function["description"],
                parameters=OpenAIFunctionParametersSchema(
                    type="object", properties=properties, required=parameters["required"]
                ),
            ),
        )

    @property
    def client(self) -> ToolClient:
        # Made at first use: it belongs to the event loop that runs the rollouts, not to the one that loads the config.
        if self._client is None:
            options = {key: self.config[key] for key in ("away_seconds",) if key in self.config}
            if self._backend == "ray":
                self._client = ToolClient.from_ray(**options)
            elif self._backend == "sandbox_fusion":
                self._client = ToolClient.sandbox_fusion(self.config["url"], **options)
            else:
                self._client = ToolClient.from_url(self.config["url"], token=self.config.get("token"), **options)
        return self._client

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float, dict[str, Any]]:
        """Run `parameters["code"]`.

        Returns:
            (text for the model, 0.0, {"outcome": of the closed set, "seconds": wall time, "detail": for operators}).
            A failing server is the outcome "infra", never an exception and never charged to the code.
        """
        result = await self.client.run(parameters["code"], timeout=self.config.get("timeout"))
        text = result.output
        lines = self.config.get("error_lines")
        if lines and result.outcome in ("error", "syntax_error"):
            text = "\n".join(text.rstrip("\n").splitlines()[-lines:])
        metrics = {"outcome": result.outcome.value, "seconds": result.seconds, "detail": result.detail}
        return ToolResponse(text=text), 0.0, metrics
