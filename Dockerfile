# Convoy's images. `make image TARGET=serve` (or serve-gpu, train) builds one with docker, podman or
# buildah; plain `docker build --target serve .` works as well.
#
#   serve       convoy:cpu    convoy serve on CPUs
#   serve-gpu   convoy:gpu    the same on NVIDIA cards; without one it does not start (CONVOY_DEVICE)
#   train       convoy:train  convoy train, with TensorFlow; all other commands, too
#
# user        10001:10001, no root anywhere; nothing is setuid, there is no compiler and no pip of ours
# ports       8000 HTTP, 8001 gRPC, 8002 /metrics, /healthz, /readyz
# /models     CONVOY_MODELS: the models that come with Convoy; mount your own over it
# /cache      HOME: copies of models from object stores, decoded images, TensorRT's engines, checkpoints
# read-only   the root file system may be. Then give it a tmpfs or volume at /tmp (sockets of --engines,
#             TensorFlow), and one that 10001 may write at /cache where something of the above is used
# stopping    SIGTERM; give it more than --shutdown-delay-s and --drain-grace-s, 25 s together:
#             `docker stop -t 30`
# settings    CONVOY_* variables, or flags: `docker run convoy:cpu serve --engines 1`
# size        over that of the base: serve 267 MB (ONNX Runtime 80, NumPy 71, Pillow 24, grpcio 19, obstore
#             16, the compiled standard library 13), serve-gpu 2.7 GB (NVIDIA's libraries 2.1, ONNX
#             Runtime 0.36), train 2.4 GB (TensorFlow 1.5 without its headers, pyarrow 0.18, SciPy 0.15)
# packages    locks/*.txt, by hash. --build-arg SERVE_LOCKS="-r cpu.txt -r parquet.txt" adds pyarrow, for
#             --feedback; "-r cpu.txt -r bulk.txt" Ray, for `convoy bulk` (make image TARGET=bulk: convoy:bulk;
#             on cards GPU_LOCKS="-r gpu.txt -r bulk.txt"); TRAIN_LOCKS="-r train-gpu.txt" takes TensorFlow
#             with its CUDA parts
# index       pip's own: --secret id=pip,src=pip.conf, and id=ca for a certificate that it names
#             (deploy/image.sh writes both from pip's configuration); no layer keeps them
#
# Digests decide; tags are for readers. docs/supply-chain.md says how to bring them up to date.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.15-slim-bookworm@sha256:d29f48a31a8b408ed19272ca1e7b10ebae13b240a27e862d3d4217c528e2e0c3
# Of CUDA it brings the runtime and `cuda-compat`, with which older drivers will do; cuBLAS, cuDNN and
# the others come with the locked packages, in the versions that ONNX Runtime was built for.
ARG CUDA_IMAGE=docker.io/nvidia/cuda:13.0.3-base-ubuntu24.04@sha256:7c7413a56200486f71f181cad9310f6fd31b6bb21816ade15fc9c1e1e927a5c1

# What images run on: Python, compiled, as nobody can write .pyc files later (the public image has
# none), and a user.
FROM ${PYTHON_IMAGE} AS python
RUN python3 -m compileall -q --invalidation-mode unchecked-hash \
        -x '/(site-packages|test|idlelib|lib2to3|tkinter|turtledemo|ensurepip)/' \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && useradd --no-log-init --no-create-home --home-dir /cache --uid 10001 --user-group convoy \
    && install -d -o convoy -g convoy /cache \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
ENV PATH=/opt/convoy/bin:$PATH HOME=/cache CONVOY_MODELS=/models \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

FROM ${CUDA_IMAGE} AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/apt /var/log/dpkg.log /var/cache/ldconfig \
    && useradd --no-log-init --no-create-home --home-dir /cache --uid 10001 --user-group convoy \
    && install -d -o convoy -g convoy /cache \
    && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
ENV PATH=/opt/convoy/bin:$PATH HOME=/cache CONVOY_MODELS=/models CONVOY_DEVICE=cuda \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# What builds: pip in an environment of its own, which fills /opt/convoy.
FROM python AS tools
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/convoy
ENV PIP="/opt/tools/bin/pip --python /opt/convoy/bin/python" \
    COMPILE="/opt/convoy/bin/python -m compileall -q --invalidation-mode unchecked-hash" \
    PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

FROM cuda AS tools-gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/convoy
ENV PIP="/opt/tools/bin/pip --python /opt/convoy/bin/python" \
    COMPILE="/opt/convoy/bin/python -m compileall -q --invalidation-mode unchecked-hash" \
    PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# The packages: the large layers, which change with the locks alone.
FROM tools AS packages
ARG SERVE_LOCKS="-r cpu.txt"
COPY locks/cpu.txt locks/parquet.txt locks/bulk.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    $PIP install --no-compile --require-hashes $SERVE_LOCKS && $COMPILE /opt/convoy

FROM tools-gpu AS packages-gpu
ARG GPU_LOCKS="-r gpu.txt"
COPY locks/gpu.txt locks/parquet.txt locks/bulk.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    $PIP install --no-compile --require-hashes $GPU_LOCKS && $COMPILE /opt/convoy

FROM tools AS packages-train
ARG TRAIN_LOCKS="-r train.txt"
COPY locks/train.txt locks/train-gpu.txt ./
# TensorFlow's headers are for those who compile operations: 430 MB.
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    $PIP install --no-compile --require-hashes $TRAIN_LOCKS \
    && rm -r /opt/convoy/lib/python3*/site-packages/tensorflow/include && $COMPILE /opt/convoy

# Convoy itself: small, and changes often. The models are a layer of their own.
FROM tools AS wheel
COPY locks/build.txt ./
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=secret,id=ca \
    /opt/tools/bin/pip install --require-hashes -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY convoy convoy
COPY service service
COPY training training
RUN mkdir models && /opt/tools/bin/pip wheel --no-deps --no-build-isolation --no-index -w /dist .

FROM tools AS app
COPY --from=wheel /dist /dist
RUN $PIP install --no-deps --no-index --no-compile --prefix /app /dist/*.whl && $COMPILE /app

FROM tools-gpu AS app-gpu
COPY --from=wheel /dist /dist
RUN $PIP install --no-deps --no-index --no-compile --prefix /app /dist/*.whl && $COMPILE /app

FROM python AS serve
COPY --from=packages /opt/convoy /opt/convoy
COPY --chown=10001:10001 models /models
COPY --from=app /app /opt/convoy
USER 10001:10001
EXPOSE 8000 8001 8002
# Process 1, without a shell between: SIGTERM reaches it.
ENTRYPOINT ["convoy"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["convoy", "health"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Convoy, serving" \
    org.opencontainers.image.description="Serves image classifiers in batches over gRPC, on CPUs" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

FROM cuda AS serve-gpu
COPY --from=packages-gpu /opt/convoy /opt/convoy
COPY --chown=10001:10001 models /models
COPY --from=app-gpu /app /opt/convoy
USER 10001:10001
EXPOSE 8000 8001 8002
ENTRYPOINT ["convoy"]
CMD ["serve"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["convoy", "health"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Convoy, serving on NVIDIA cards" \
    org.opencontainers.image.description="Serves image classifiers in batches over gRPC, on NVIDIA cards" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"

FROM python AS train
COPY --from=packages-train /opt/convoy /opt/convoy
COPY --chown=10001:10001 models /models
COPY --from=app /app /opt/convoy
ENV CONVOY_CHECKPOINTS=/cache/checkpoints
USER 10001:10001
ENTRYPOINT ["convoy"]
CMD ["train"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Convoy, training" \
    org.opencontainers.image.description="Trains image classifiers, proves their ONNX export, publishes them" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
