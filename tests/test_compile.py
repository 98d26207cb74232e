"""compile=true: which graph a forward pass takes, and how inductor chooses its kernels."""

import pytest
import torch


@pytest.fixture
def taken(monkeypatch):
    """The shape of the images, as text, in the graph that each forward pass takes. A symbol in it means a
    graph for several shapes. Graphs are made by torch and run without inductor, which would take minutes.
    """
    import torch._inductor.compile_fx

    taken = []

    def compile_fx(graph, inputs, **options):
        assert torch._inductor.config.deterministic == torch.are_deterministic_algorithms_enabled()
        shapes = [node.meta["example_value"].shape for node in graph.graph.find_nodes(op="placeholder")
                  if isinstance(node.meta["example_value"], torch.Tensor)]  # fmt: skip
        (shape,) = {str(tuple(shape)) for shape in shapes if len(shape) == 4 and shape[1:] == (3, 32, 32)}

        def run(*arguments):
            taken.append(shape)
            return graph(*arguments)

        return run

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    torch._dynamo.reset()
    yield taken
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_smaller_last_pass_leaves_the_others_their_graph(train, taken):
    """24 images in passes of 16 and 8: a process that resumes takes the graphs of the one before."""
    job = ["model=timm", "model.timm=test_convnext", "compile=true", "batch=24", "forward_images=16"]
    job += ["evaluate_every=never", "run=a"]
    assert train(*job, "steps=2") == 0
    torch._dynamo.reset()  # as in a new process
    assert train(*job, "steps=4") == 0
    assert taken == ["(16, 3, 32, 32)", "(8, 3, 32, 32)"] * 4


@pytest.mark.slow
def test_the_bench_compiles_each_batch_size_in_the_same_way(reconverge, taken):
    """Ten of them: torch would go on without compiling after eight."""
    job = ["model=timm", "model.timm=test_convnext", "compile=true", "threads=1", "--phase", "inference"]
    sizes = ",".join(map(str, range(1, 11)))
    code, said = reconverge("bench", "model", *job, "--seconds", "0.001", "--batches", sizes)
    assert code == 0, said
    assert list(dict.fromkeys(taken)) == [f"({size}, 3, 32, 32)" for size in range(1, 11)]
