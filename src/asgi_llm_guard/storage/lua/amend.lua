-- amend: replace the claims of an open hold, or change nothing.
--
-- ARGV: clock, epoch, oldest heartbeat the client knows of, lapse, new shapes, owner, call id, and a plan of one bundle as
-- `take` reads it.
-- Reply: clock, epoch, one answer:
--   {1, for each claim its limit and 5 numbers} granted   {0, the same} does not fit, nothing has changed
--   {2, reason}  the call id has ended   {4} {5} {6}  as for reserve
local epoch = call('GET', KEYS[1])
if not epoch or sub(epoch, 1, #ARGV[2]) ~= ARGV[2] or tonumber(string.match(epoch, ' (%d+) ')) < tonumber(ARGV[3]) then
  return {now, epoch or '', 'lost'}
end
learn_shapes(ARGV[5])
local lapse, owner, id, f = tonumber(ARGV[4]), ARGV[6], ARGV[7], cmsgpack.unpack(ARGV[8])

local score = call('ZSCORE', OWNERS, owner)
score = score and tonumber(score)
local lapsed = #call('ZRANGEBYSCORE', OWNERS, '-inf', now, 'LIMIT', 0, 1) > 0
if lapsed and (score and score <= now or not score and call('HEXISTS', LAPSED, owner) == 1) then return {now, epoch, {4}} end
local value = call('GET', HOLD .. id)
if not value or state_of(value) ~= 'O' then
  local reason
  if value and now < cmsgpack.unpack(value)[2] then reason = REASON[state_of(value)] end
  if not reason and call('HEXISTS', LEDGER_IDS, id) == 1 then reason = 'settled' end
  return {now, epoch, {2, reason or 'unknown'}}
end
local h = cmsgpack.unpack(value)
local shape, shape_before = shape_of(f[2]), shape_of(h[6])
if not shape or not shape_before then return {now, epoch, {6}} end

local before, names = {}, {}
for _, c in ipairs(claims_of(h, h[3], shape_before, 7)) do
  if c.taken == 1 then before[#before + 1] = c end
end
names_of(before, names)
local asked, q = {}, 3
for i = 1, #shape, 5 do
  local kind = shape[i]
  local name = CELL .. shape[i + 4] .. f[q]
  asked[#asked + 1] = name
  local member = kind == DISTINCT and f[q + 1] or nil
  q = q + (kind == DISTINCT and 2 or 1) + (shape[i + 3] >= 8 and 1 or 0)
  local amount, limit = f[q], f[q + 1]
  for _, c in ipairs(before) do
    local lower = limit >= 0 and (c.limit < 0 or limit < c.limit)
    if c.name == name and c.amount == amount and c.member == member and not lower then c.kept = true end
  end
  q = q + (kind == CALENDAR and 4 or 2)
end
for i = 1, #asked do names[#names + 1] = asked[i] end
load_cells(names)

local given_back, kept = {}, {}
for _, c in ipairs(before) do
  if c.kept then kept[c.name] = c else given_back[#given_back + 1] = c end
end
release(given_back, {}, true)
local fits, out, holds = take(f, 1, 1, asked, 1, h[3], h[4], kept)
if fits == STALE then return {now, epoch, {5}} end
if not fits and lapsed then return {now, epoch, {4}} end
local answer, at = {fits and 1 or 0}, 1
for i = 1, #asked do
  local old = kept[asked[i]]
  answer[at + 1] = old and old.limit or -2 -- -2: the limit that was asked under
  for j = 1, 5 do answer[at + 1 + j] = out[(i - 1) * 5 + 2 + j] end
  at = at + 6
end
if not fits then return {now, epoch, answer} end

save_cells()
holds[1][2] = written_owner(owner, id)
call('SET', HOLD .. id, pack_array(holds[1].n, holds[1]), 'PX', LONGEST)
local before_it = owner_of(h, id)
if before_it ~= owner then
  call('SREM', OPEN .. before_it, id)
  call('SADD', OPEN .. owner, id)
  call('PEXPIRE', OPEN .. owner, LONGEST)
end
if not score then
  call('ZADD', OWNERS, now + lapse, owner)
  call('PEXPIRE', OWNERS, KEEP)
end
return {now, epoch, answer}
