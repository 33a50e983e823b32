-- What every script begins with: the clock, the keys, cells, shapes, holds and the ledger.
--
-- KEYS[1] is the namespace's epoch key. All others are made from it here: they carry the same hash tag, so they are in
-- its slot, and which they are is known only when a hold has been read.
--
--   <ns>:e           epoch       "<id> <last heartbeat, ms> <id before it>": tells a flushed or restored store from a used one
--   <ns>:c:<meter>   cell        a byte: the window's kind; 4 doubles: used, held, start, end; then for sliding windows 3 for
--                                each sub-bucket: number, used, held
--   <ns>:m:<meter>   members     sorted set: id by the instant until which it is live
--   <ns>:h:<call>    hold        MessagePack array: 'O', owner (see `owner_of`), at, plan, draft, shape, then the claims; ended a
--                                tombstone: 'S' (settled), 'C' (cancelled) or 'E' (expired), until when, and for 'E' the hold
--   <ns>:o           owners      sorted set: owner by the instant of its lapse
--   <ns>:ol          lapsed      hash: owner to when it lapsed, until it has been told
--   <ns>:oh:<owner>  open        set of the owner's open call ids
--   <ns>:s           shapes      hash: digest to what the claims of a bundle have in common with all such bundles
--   <ns>:l           ledger      stream of usage records
--   <ns>:li          ledger ids  hash: call id to its entry in the stream
--   <ns>:v:…, <ns>:w:…           what caches keep; see entries.lua
--   <ns>:p:…, <ns>:q…, <ns>:r:…  what processes share; see shared.lua
--
-- Cells are read once and written once for each script call. Nothing is written before everything was judged, so that
-- an error leaves either nothing or (the server ran out of memory in between) charges without their hold, never the reverse.
-- Every value has the instants that decide in it; expiries only collect garbage.
-- All numbers are whole and at most 2^53 - 1, where doubles are exact. A sum beyond rounds to something above any limit.
local call, floor, fmod = redis.call, math.floor, math.fmod
local dec, enc = struct.unpack, struct.pack
local sub = string.sub

local LIFETIME, ROLLING, CALENDAR, SLIDING, BUCKET, SLOTS, DISTINCT = 0, 1, 2, 3, 4, 5, 6
local MAX = 9007199254740991
local GRACE = 600000         -- a cell outlives its window by this much, should the clock step back
local LONGEST = 2592000000   -- 30 days: no call is open for longer
local KEEP = 34560000000     -- 400 days: what all of a namespace share

local NS = sub(KEYS[1], 1, -2)
local CELL, MEMBERS, HOLD = NS .. 'c:', NS .. 'm:', NS .. 'h:'
local OWNERS, LAPSED, OPEN = NS .. 'o', NS .. 'ol', NS .. 'oh:'
local SHAPES, LEDGER, LEDGER_IDS = NS .. 's', NS .. 'l', NS .. 'li'

local now = tonumber(ARGV[1]) -- 0 outside of tests: then it is the server's
if now == 0 then
  local time = call('TIME')
  now = time[1] * 1000 + floor(time[2] / 1000)
end

local function ceil_div(a, b)
  local rest = fmod(a, b)
  if rest > 0 then return (a - rest) / b + 1 end
  return (a - rest) / b
end

-- The values of keys, in their order; false where there is none.
local MOST = 2000 -- arguments at a time, for what Lua's stack takes

local function values_of(names)
  if #names <= MOST then return call('MGET', unpack(names)) end
  local values = {}
  for from = 1, #names, MOST do
    local some = call('MGET', unpack(names, from, from + MOST < #names and from + MOST - 1 or #names))
    for i = 1, #some do values[from + i - 1] = some[i] end
  end
  return values
end

-- Cells by the names of their keys: {used, held, start, end, sub-buckets, dirty, kind, over}; false where there is none.
-- dirty: 1 to be written, 2 with a new expiry. over: when nothing counts any more, where that is later than the end.
local cells = {}

local function load_cells(names)
  local missing, n = {}, 0
  for i = 1, #names do
    local name = names[i]
    if cells[name] == nil then
      n = n + 1
      missing[n] = name
      cells[name] = false
    end
  end
  if n == 0 then return end
  local values = values_of(missing)
  for i = 1, n do
    local value = values[i]
    if value then
      local kind, used, held, start, finish, at = dec('<Bdddd', value)
      cells[missing[i]] = {used, held, start, finish, sub(value, at), false, kind}
    end
  end
end

local function save_cells()
  for name, cell in pairs(cells) do
    local dirty = cell and cell[6]
    if dirty then
      local kind = cell[7]
      if kind == SLOTS and cell[2] == 0 then
        call('DEL', name)
      else
        local value = enc('<Bdddd', kind, cell[1], cell[2], cell[3], cell[4])
        if kind == SLIDING then value = value .. cell[5] end
        if dirty == 1 and kind < BUCKET then
          call('SET', name, value, 'KEEPTTL')
        else
          local left = (cell[8] or cell[4]) - now
          left = left > 0 and left + GRACE or GRACE
          -- What is held is counted in these until it is given back, whenever that is.
          if kind >= BUCKET and cell[2] > 0 and left < LONGEST then left = LONGEST end
          call('SET', name, value, 'PX', left)
        end
      end
    end
  end
end

-- Shapes by digest: kind, p1, p2, flags and key prefix of each claim, one after the other.
-- p1, p2: the period, or what lives on; for sliding windows the length and the number of sub-buckets; for buckets the burst.
-- flags: 1 refuses, 2 gives back when its owner lapses, 4 is renewed by its use, 8 has its subject written out.
local shapes = {}

local function learn_shapes(given)
  if given ~= '' then
    call('HSET', SHAPES, unpack(cmsgpack.unpack(given)))
    call('PEXPIRE', SHAPES, KEEP)
  end
end

local function shape_of(id)
  local shape = shapes[id]
  if shape == nil then
    local value = call('HGET', SHAPES, id)
    shape = value and cmsgpack.unpack(value)
    shapes[id] = shape
  end
  return shape
end

local function flag(flags, bit)
  return fmod(floor(flags / bit), 2) == 1
end

-- The claims of a hold (or of receipts, which are written alike), as tables. Each is its key's suffix, its id (distinct ids
-- only), its subject (flag 8), the amount (below 0: -1 less what was not taken), limit, used, held, pin (most kinds: how long
-- before `at`), and when it resets (how long after the usual end of its window, or after `at`).
local function claims_of(h, at, shape, first)
  local claims, n, q = {}, 0, first
  for i = 1, #shape, 5 do
    local kind, flags = shape[i], shape[i + 3]
    local c = {kind = kind, p1 = shape[i + 1], p2 = shape[i + 2], flags = flags, suffix = h[q]}
    c.name = CELL .. shape[i + 4] .. c.suffix
    q = q + 1
    if kind == DISTINCT then
      c.member = h[q]
      q = q + 1
    end
    if flags >= 8 then
      c.subject = h[q]
      q = q + 1
    end
    c.amount, c.limit, c.taken, c.used, c.held, c.pin, c.resets = h[q], h[q + 1], 1, h[q + 2], h[q + 3], h[q + 4], h[q + 5]
    if c.amount < 0 then c.amount, c.taken = -1 - c.amount, 0 end
    if kind ~= SLIDING and kind < SLOTS then c.pin = at - c.pin end
    if c.resets then c.resets = c.resets + (kind <= ROLLING and c.pin + c.p1 or at) end
    q = q + 6
    n = n + 1
    claims[n] = c
  end
  return claims, q
end

-- `n` values as a MessagePack array, nil among them. The header is always three bytes long, so that `state_of` finds its way.
local function pack_array(n, values)
  local packed = string.char(0xdc, floor(n / 256), n % 256)
  for from = 1, n, MOST do
    packed = packed .. cmsgpack.pack(unpack(values, from, from + MOST < n and from + MOST - 1 or n))
  end
  return packed
end

local function state_of(value)
  return sub(value, 5, 5)
end

-- Call ids mostly begin with their owner and a dash; then a hold leaves its owner out.
local function owner_of(h, id)
  if h[2] ~= '' then return h[2] end
  return string.match(id, '^(.*)%-')
end

local function written_owner(owner, id)
  if string.match(id, '^(.*)%-') == owner then return '' end
  return owner
end

local REASON = {S = 'settled', C = 'cancelled', E = 'expired'}

local function names_of(claims, names)
  for i = 1, #claims do
    if claims[i].kind ~= DISTINCT then names[#names + 1] = claims[i].name end
  end
  return names
end

-- The ledger. Entries leave it at its old end only, so that a reader can tell by their number what it has missed: one whose
-- place is taken by another stays until it is the oldest, and the one that its call id leads to is the one that counts.
local function forget(entry, id)
  if call('HGET', LEDGER_IDS, id) == entry then call('HDEL', LEDGER_IDS, id) end
  call('XDEL', LEDGER, entry)
end

-- `keep`: how many entries, the oldest go first.
local function append(id, record, keep, mark, value)
  local entry
  if mark then
    entry = call('XADD', LEDGER, '*', 'c', id, 'r', record, mark, value)
  else
    entry = call('XADD', LEDGER, '*', 'c', id, 'r', record)
  end
  call('HSET', LEDGER_IDS, id, entry)
  local count = call('XLEN', LEDGER)
  if count > keep then
    local oldest = call('XRANGE', LEDGER, '-', '+', 'COUNT', count - keep > 1 and 2 or 1)
    for i = 1, #oldest do forget(oldest[i][1], oldest[i][2][2]) end
  elseif count == 1 then
    call('PEXPIRE', LEDGER, KEEP)
    call('PEXPIRE', LEDGER_IDS, KEEP)
  end
end
