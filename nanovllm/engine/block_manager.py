"""BlockManager: which KV block belongs to whom, and the prefix cache.

A block of the KV cache holds K and V of `block_size` consecutive tokens. It is in exactly one of three states:

    used       reference count above 0: in the block tables of that many sequences
    findable   reference count 0, contents still known to the prefix cache: the next request with that prefix takes it
    blank      reference count 0, contents unknown

Findable and blank blocks together are the free ones, kept in one queue: blank at the front, then findable from the least
to the most recently used. Taking a block from the front forgets what it held.

A block is published to the prefix cache once it is full and its K and V have been computed. It is found by a chained hash
(of its tokens and the hash before it), and a hit counts only if its tokens are equal and it continues the very prefix that
was matched so far: a collision of hashes costs a miss, never a wrong answer.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable

import xxhash

from nanovllm.engine.sequence import Sequence

HashFunction = Callable[[int, "array[int]"], int]
ROOT = 0  # the hash, and the prefix id, of the empty prefix
NO_TOKENS = array("i")


def hash_block(parent_hash: int, token_ids: "array[int]") -> int:
    """The chained hash of a full block: xxh64 of its token ids, seeded with the hash of the block before it."""
    return xxhash.xxh64_intdigest(token_ids, parent_hash)


class Block:
    """One KV block and, once it is published, what it holds.

    prefix_id numbers the prefix that ends with this block. It is given when that prefix is first published and never
    used again for another, so that `parent_id == other.prefix_id` proves that this block continues `other`.
    """

    __slots__ = ("block_hash", "block_id", "parent_id", "prefix_id", "ref_count", "token_ids")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.forget()

    def forget(self) -> None:
        """Become blank."""
        self.block_hash: int | None = None  # set while the prefix cache finds this block by it
        self.token_ids = NO_TOKENS
        self.parent_id = ROOT
        self.prefix_id = ROOT


class BlockManager:
    """Hands out the blocks of one KV cache. Every operation is O(1) a block.

    Args:
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
        enable_prefix_caching: whether blocks are published and found again.
        hash_function: of (hash of the block before, token ids); replaced by tests that force collisions.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        hash_function: HashFunction = hash_block,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._hash_function = hash_function
        self.reset()

    def reset(self) -> None:
        """Free every block and forget what it held. Correct whatever state an exception left behind."""
        self.blocks = [Block(block_id) for block_id in range(self.num_blocks)]
        self._free = OrderedDict((block.block_id, block) for block in self.blocks)
        self._published: dict[int, Block] = {}  # hash -> the one block that is found by it
        self._being_computed: dict[int, Block] = {}  # hash -> a used block that will be published under it
        self._next_prefix_id = ROOT + 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out: blank and findable."""
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    # ---- giving blocks to a sequence ----

    def find_prefix(self, seq: Sequence) -> list[Block]:
        """The published blocks that hold the longest prefix of `seq`, its last token always left to compute."""
        hits: list[Block] = []
        if not self.enable_prefix_caching:
            return hits
        self._hash_full_blocks(seq)
        parent_id = ROOT
        for index in range((len(seq) - 1) // self.block_size):
            block = self._published.get(seq.block_hashes[index])
            if block is None or block.parent_id != parent_id or block.token_ids != self._tokens_of(seq, index):
                break
            hits.append(block)
            parent_id = block.prefix_id
        return hits

    def is_next_block_being_computed(self, seq: Sequence, num_hits: int) -> bool:
        """Whether the first block of `seq` that missed is just being computed for another: waiting will make it a hit."""
        if not self.enable_prefix_caching or num_hits >= (len(seq) - 1) // self.block_size:
            return False
        return seq.block_hashes[num_hits] in self._being_computed

    def can_allocate(self, seq: Sequence, hits: list[Block]) -> bool:
        """Whether blocks for all tokens of `seq` can be had, given that it shares `hits`."""
        findable_hits = sum(block.ref_count == 0 for block in hits)
        return self.num_blocks_for(len(seq)) - len(hits) + findable_hits <= len(self._free)

    def allocate(self, seq: Sequence, hits: list[Block]) -> int:
        """Give `seq`, which has no blocks, blocks for all its tokens: the shared `hits`, then new ones.

        Returns:
            How many leading tokens need not be computed.
        """
        assert not seq.block_table, f"sequence {seq.seq_id} already has blocks"
        for block in hits:
            if block.ref_count == 0:
                del self._free[block.block_id]
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.num_published_blocks = len(hits)
        for index in range(len(hits), self.num_blocks_for(len(seq))):
            block = self._take_free_block()
            seq.block_table.append(block.block_id)
            if index < len(seq.block_hashes):
                self._being_computed.setdefault(seq.block_hashes[index], block)
        return len(hits) * self.block_size

    def extend(self, seq: Sequence) -> int:
        """Add a block, which must be free, to the end of the table of `seq`; its id."""
        block = self._take_free_block()
        seq.block_table.append(block.block_id)
        return block.block_id

    def free(self, seq: Sequence) -> None:
        """Take all blocks from `seq`. Published ones stay findable, the end of the prefix to be reused first."""
        for index in reversed(range(len(seq.block_table))):
            block = self.blocks[seq.block_table[index]]
            if index >= seq.num_published_blocks and index < len(seq.block_hashes):
                self._stop_computing(seq.block_hashes[index], block)
            block.ref_count -= 1
            assert block.ref_count >= 0, f"block {block.block_id} was freed more often than it was taken"
            if block.ref_count == 0:
                self._free[block.block_id] = block
                if block.block_hash is None:
                    self._free.move_to_end(block.block_id, last=False)
        seq.block_table.clear()
        seq.num_published_blocks = 0

    def _take_free_block(self) -> Block:
        assert self._free, "no free KV block; the scheduler must ask first"
        _, block = self._free.popitem(last=False)
        if block.block_hash is not None:
            del self._published[block.block_hash]
        block.forget()
        block.ref_count = 1
        return block

    # ---- the prefix cache ----

    def publish(self, seq: Sequence, num_computed_tokens: int) -> None:
        """Publish the blocks of `seq` that are full of computed tokens and not yet known."""
        num_full_blocks = num_computed_tokens // self.block_size
        if not self.enable_prefix_caching or num_full_blocks == seq.num_published_blocks:
            return
        self._hash_full_blocks(seq)
        first = seq.num_published_blocks
        parent_id = self.blocks[seq.block_table[first - 1]].prefix_id if first else ROOT
        for index in range(first, num_full_blocks):
            block = self.blocks[seq.block_table[index]]
            self._publish_block(block, seq.block_hashes[index], self._tokens_of(seq, index), parent_id)
            parent_id = block.prefix_id
        seq.num_published_blocks = num_full_blocks

    def _publish_block(self, block: Block, block_hash: int, token_ids: "array[int]", parent_id: int) -> None:
        self._stop_computing(block_hash, block)
        block.token_ids, block.parent_id = token_ids, parent_id
        known = self._published.get(block_hash)
        if known is not None and known.parent_id == parent_id and known.token_ids == token_ids:
            block.prefix_id = known.prefix_id  # the same prefix twice: the first stays the one that is found
            return
        if known is not None:
            self._unpublish(known)  # a collision, or a block whose parent is gone: the newer is of more use
        block.prefix_id = self._next_prefix_id
        self._next_prefix_id += 1
        block.block_hash = block_hash
        self._published[block_hash] = block

    def _unpublish(self, block: Block) -> None:
        assert block.block_hash is not None, f"block {block.block_id} is not published"
        del self._published[block.block_hash]
        block.block_hash = None
        if block.ref_count == 0:
            self._free.move_to_end(block.block_id, last=False)

    def _stop_computing(self, block_hash: int, block: Block) -> None:
        if self._being_computed.get(block_hash) is block:
            del self._being_computed[block_hash]

    def _hash_full_blocks(self, seq: Sequence) -> None:
        block_size, hashes = self.block_size, seq.block_hashes
        parent_hash = hashes[-1] if hashes else ROOT
        for start in range(len(hashes) * block_size, len(seq) - block_size + 1, block_size):
            parent_hash = self._hash_function(parent_hash, seq.token_ids[start : start + block_size])
            hashes.append(parent_hash)

    def _tokens_of(self, seq: Sequence, index: int) -> "array[int]":
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
