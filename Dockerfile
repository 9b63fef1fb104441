# Three images, by target:
#   studio    the API, the gateway, the consumers, the relay: no torch, no Ray
#   server    model servers (`python -m workloads.serve`), and the serving consumer where it starts them itself
#   trainer   the head and the workers of a Ray cluster, with the training program
# docker build --target studio --tag mini-studio:0.1.0 .

FROM python:3.11.14-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_ARENA_MAX=2 \
    MINI_STUDIO_DATA=/data \
    MINI_STUDIO_DFS_ROOT=/dfs \
    MINI_STUDIO_MODELS_ROOT=/models \
    MINI_STUDIO_HEALTH_PORT=8000
# a volume that is mounted on one of the three folders for the first time takes over its owner
RUN groupadd --gid 10001 studio \
 && useradd --uid 10001 --gid studio --home-dir /tmp --no-create-home --no-log-init --shell /usr/sbin/nologin studio \
 && install --directory --owner studio --group studio /data /dfs /models

# Each `packages-*` stage adds to the one before it; they change with pyproject.toml and constraints.txt alone.
FROM base AS packages-studio
ENV UV_NO_CACHE=1 \
    UV_COMPILE_BYTECODE=1 \
    UV_CONSTRAINT=/src/constraints.txt \
    UV_BUILD_CONSTRAINT=/src/constraints.txt \
    VIRTUAL_ENV=/opt/venv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -m venv /opt/uv \
 && /opt/uv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt uv \
 && python -m venv --without-pip /opt/venv \
 && /opt/uv/bin/uv pip install --requirements pyproject.toml

FROM packages-studio AS packages-server
# cpu, or cu130 for NVIDIA GPUs; empty: the build of torch that the package registry has, with CUDA
ARG TORCH_BACKEND=cpu
RUN /opt/uv/bin/uv pip install ${TORCH_BACKEND:+--torch-backend="$TORCH_BACKEND"} \
    --requirements pyproject.toml --extra workloads

FROM packages-server AS packages-trainer
RUN /opt/uv/bin/uv pip install ${TORCH_BACKEND:+--torch-backend="$TORCH_BACKEND"} \
    --requirements pyproject.toml --extra workloads --extra ray

FROM packages-studio AS venv-studio
COPY . .
RUN /opt/uv/bin/uv pip install --no-deps .

FROM packages-server AS venv-server
COPY . .
RUN /opt/uv/bin/uv pip install --no-deps .

FROM packages-trainer AS venv-trainer
COPY . .
RUN /opt/uv/bin/uv pip install --no-deps .

FROM base AS runtime
LABEL org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.vendor="Mini Studio"
WORKDIR /data
USER 10001:10001

FROM runtime AS trainer
LABEL org.opencontainers.image.title="mini-studio-trainer" \
      org.opencontainers.image.description="A node of the Ray cluster that Mini Studio trains on"
COPY --from=venv-trainer /opt/venv /opt/venv
EXPOSE 6379 8265
# the one address that a head answers without its token
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8265, timeout=4); c.request('GET', '/api/gcs_healthz'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["ray"]
CMD ["start", "--head", "--block", "--dashboard-host=0.0.0.0", "--disable-usage-stats"]

# The API, the gateway, every consumer, the relay and the model server: each answers /health on this port.
FROM runtime AS served
ENV PYTHONSAFEPATH=1
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); raise SystemExit(c.getresponse().status != 200)"]

FROM served AS server
LABEL org.opencontainers.image.title="mini-studio-server" \
      org.opencontainers.image.description="A model server of Mini Studio"
COPY --from=venv-server /opt/venv /opt/venv
ENTRYPOINT ["python", "-m", "workloads.serve"]
CMD ["--help"]

FROM served AS studio
LABEL org.opencontainers.image.title="mini-studio" \
      org.opencontainers.image.description="API, gateway, consumers and relay of Mini Studio"
COPY --from=venv-studio /opt/venv /opt/venv
ENTRYPOINT ["mini-studio"]
CMD ["--help"]
