-- heartbeat, retire, sweep: who is alive, and what becomes of the holds of those who are not.
--
-- ARGV: clock, what to do, owner, lapse, tombstone's life, records to keep, the epoch the client knows (heartbeats need it),
-- and, when asked again, all shapes it knows.
-- Reply: clock, epoch, 1 if this owner had lapsed, how many owners are alive, then the call ids that were expired.
--   Or clock, epoch, 'shapes': those of some holds are not known, and nothing was done.
--   Or clock, epoch, 'more', the call ids that were expired: there are more of them, ask again.
local OWNER_MEMORY = 86400000 -- a lapsed owner is remembered for a day, should it wake up

local action, owner, lapse, life, keep = ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local epoch = call('GET', KEYS[1]) or ''
local expired, more, lapsed
if ARGV[8] then learn_shapes(ARGV[8]) end

if action == 'retire' then
  expired, more = expire({owner}, life, keep, ARGV[8])
else
  expired, more = sweep(life, keep, ARGV[8])
end
if not expired then return {now, epoch, 'shapes'} end
if more then return {now, epoch, 'more', unpack(expired)} end
if action == 'retire' then
  call('ZREM', OWNERS, owner)
  call('HDEL', LAPSED, owner)
end
if action == 'beat' then
  lapsed = call('HDEL', LAPSED, owner)
  call('ZADD', OWNERS, now + lapse, owner)
  local told = call('HGETALL', LAPSED)
  for i = 1, #told, 2 do
    if tonumber(told[i + 1]) + OWNER_MEMORY <= now and not call('ZSCORE', OWNERS, told[i]) then call('HDEL', LAPSED, told[i]) end
  end
  call('PEXPIRE', OPEN .. owner, LONGEST)
  for _, name in ipairs({OWNERS, LAPSED, SHAPES, LEDGER, LEDGER_IDS, KEYS[1]}) do call('PEXPIRE', name, KEEP) end
  local id, beat, before = string.match(epoch, '^(%S+) (%d+) (%S*)$')
  if id and id == ARGV[7] and now > tonumber(beat) then
    epoch = id .. ' ' .. string.format('%.0f', now) .. ' ' .. before
    call('SET', KEYS[1], epoch, 'PX', KEEP)
  end
end
local reply = {now, epoch, lapsed or 0, call('ZCARD', OWNERS)}
for i = 1, #expired do reply[4 + i] = expired[i] end
return reply
