# One image for every role: `docker run endmark api`, `docker run endmark worker`.
FROM python:3.12-slim AS build
RUN pip install --no-cache-dir uv==0.13.8
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PYTHON_DOWNLOADS=never \
    UV_PROJECT_ENVIRONMENT=/opt/endmark
WORKDIR /src
# `--build-arg EXTRAS="--extra nanobot"` adds an optional agent.
ARG EXTRAS=""
# The dependencies first: a layer that changes only with the lock file.
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --no-dev --no-install-project ${EXTRAS}
COPY README.md LICENSE ./
COPY api api
COPY worker worker
COPY shared shared
COPY cli cli
RUN uv sync --frozen --no-dev --no-editable ${EXTRAS}

FROM python:3.12-slim
LABEL org.opencontainers.image.title="Endmark" \
      org.opencontainers.image.description="OpenAI-compatible completions of agents, on a queue, with endings that are never a lie" \
      org.opencontainers.image.licenses="MIT"
# A fixed number, so that volumes and Kubernetes' runAsNonRoot can name it.
RUN groupadd --gid 10001 endmark && useradd --uid 10001 --gid endmark --create-home endmark
COPY --from=build /opt/endmark /opt/endmark
# The image holds all bytecode, and nothing is written at run time: it runs with a read-only root.
ENV PATH=/opt/endmark/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/endmark
EXPOSE 8900
# A shell-less entry point: the process is pid 1 and gets SIGTERM itself, which starts its drain.
ENTRYPOINT ["endmark"]
CMD ["--help"]
