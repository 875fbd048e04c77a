# Exported from chapters/part_4_scaling_up/4_1_bpe.ipynb. Edit the lesson, then run: make export
"""Byte-pair encoding, the algorithms: cut text into chunks, learn merges from them, apply the merges by rank."""

import heapq
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping

import regex

__all__ = ["GPT2_PATTERN", "split_chunks", "neighbors", "learn_merges", "merge_by_rank"]


GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 cuts text into chunks before any merging (Radford et al. 2019): no token spans two chunks."""


def split_chunks(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """Cut `text` into the chunks that `pattern` finds; joined, they are the text again.

    Raises:
        ValueError: if the pattern has a capturing group, or leaves something of the text out.
    """
    compiled = regex.compile(pattern)  # compiled once: regex keeps a cache
    if compiled.groups:
        raise ValueError("the pattern has a capturing group, write (?:...) instead of (...)")
    chunks = compiled.findall(text)
    if "".join(chunks) != text:
        raise ValueError("the pattern skips a part of the text, which would be lost: let it match everything")
    return chunks


def neighbors(word: str) -> Iterator[str]:
    """The pairs that stand side by side: `"abcd"` gives `"ab"`, `"bc"`, `"cd"`."""
    return map(operator.add, word, word[1:])


def learn_merges(chunk_counts: Mapping[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The merges that BPE learns from chunks of text and how often each occurs (Sennrich et al. 2016).

    Ids 0 to 255 are the bytes; merge number i makes token 256 + i. Each merge takes the pair of neighbors with
    the highest count; of several, the one with the smallest first id, then the smallest second id. There are
    fewer than `n_merges` where the text runs out of pairs. Source of the idea: Gage 1994.

    A chunk is kept as a string in which character number i stands for token i, so that a merge is
    `str.replace`: from left to right, without overlaps. Only chunks that hold the merged pair are looked at.
    """
    words = [chunk.encode("utf-8").decode("latin-1") for chunk in chunk_counts]  # one character for each byte
    weights = list(chunk_counts.values())
    counts: dict[str, int] = defaultdict(int)  # how often each pair occurs, now
    where: dict[str, set[int]] = defaultdict(set)  # the words that hold it, or once held it
    for i, word in enumerate(words):
        for pair in neighbors(word):
            counts[pair] += weights[i]
            where[pair].add(i)

    # One entry for each pair, never below its count: a pair of old tokens can only become rarer.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[tuple[int, int]] = []
    while heap and len(merges) < n_merges:
        claimed, best = heapq.heappop(heap)
        if counts[best] != -claimed:  # it became rarer since: put it back where it belongs
            if counts[best]:
                heapq.heappush(heap, (-counts[best], best))
            continue
        token = chr(256 + len(merges))
        merges.append((ord(best[0]), ord(best[1])))
        born = set()
        for i in where.pop(best):
            old = words[i]
            new = words[i] = old.replace(best, token)
            for pair in neighbors(old):
                counts[pair] -= weights[i]
            for pair in neighbors(new):
                counts[pair] += weights[i]
                if token in pair:
                    where[pair].add(i)
                    born.add(pair)
        for pair in born:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges


def merge_by_rank(data: bytes, ranks: Mapping[bytes, int], below: float = float("inf")) -> list[bytes]:
    """The tokens of one chunk: join the two neighbors of lowest rank, the leftmost first, as long as there are any.

    Candidates wait in a heap, so n bytes take O(n log n) steps: a chunk may be a whole Chinese paragraph.

    Args:
        data: The chunk.
        ranks: Each token's rank. Every single byte has one.
        below: Only tokens of lower rank are made.
    """
    n = len(data)
    end = [*range(1, n + 1), 0]  # the token that begins at i goes to end[i]; 0: none begins there any more
    before = [*range(-1, n)]  # where the token to the left of i begins
    heap: list[tuple[int, int, int]] = []  # (rank, i, k): data[i:k] would be a token

    def offer(i: int, k: int) -> None:
        if (rank := ranks.get(data[i:k], below)) < below:
            heapq.heappush(heap, (rank, i, k))

    for i in range(n - 1):
        offer(i, i + 2)
    while heap:
        _, i, k = heapq.heappop(heap)
        j = end[i]  # data[i:j] and data[j:k], if they are still there
        if not 0 < j < k or end[j] != k:
            continue
        end[i], end[j], before[k] = k, 0, i
        if i > 0:
            offer(before[i], k)
        if k < n:
            offer(i, end[k])
    return [data[i : end[i]] for i in range(n) if end[i]]
