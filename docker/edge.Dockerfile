# What an edge device needs: the runtime and ONNX Runtime, no torch. The extra `bench` brings what measuring needs.
#   docker build -f docker/edge.Dockerfile -t edgestill-edge .
#   docker run -v "$PWD/bundle:/bundle:ro" -v "$PWD/images:/images:ro" edgestill-edge detect --model /bundle /images
FROM python:3.12-slim
WORKDIR /opt/edgestill
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY runtime runtime
COPY benchmarks benchmarks
COPY compress/__init__.py compress/__init__.py
RUN pip install --no-cache-dir -c constraints.txt '.[cpu]'
ENTRYPOINT ["python", "-m", "runtime"]
