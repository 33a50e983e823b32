-- Documents, tallies and marks (shared.py): what the processes of a namespace share beside the counters.
--
-- KEYS[1] is the namespace's epoch key, and the others are made from it, as in state.lua:
--
--   <ns>:p:<name>          document  hash: v version, d data
--   <ns>:q:<name>:<hour>   tally     hash: key to count
--   <ns>:qh:<name>         hours     sorted set: the hours of a tally, by themselves
--   <ns>:qt:<token>        a tally that was counted, for as long as it may be asked again
--   <ns>:r:<name>          mark      "<until> <token>"
--
-- ARGV: clock, operation, name, then
--   publish   version, data                   -> 1: it is there now
--   document  version                         -> {version, data} of a newer one, or nil
--   tally     hour, how long hours are kept, how many keys, the key of the rest, token, then key, count …
--   hours     since, how long hours are kept  -> the hours
--   tallies   hour …                          -> for each {key, count …}
--   mark      until, token                    -> 1: it is this caller's
--   unmark
-- Instants and versions are whole and below 2^53. Documents that somebody asks for never end.
local call = redis.call
local GRACE = 1000
local KEEP = 34560000000    -- 400 days, as in state.lua
local REPEATED = 60000

local now = tonumber(ARGV[1]) -- 0 outside of tests: then it is the server's
if now == 0 then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local action, name = ARGV[2], ARGV[3]
local NS = string.sub(KEYS[1], 1, -2)

if action == 'document' then
  local key = NS .. 'p:' .. name
  local version = call('HGET', key, 'v')
  if not version then return false end
  if call('PTTL', key) < KEEP / 2 then call('PEXPIRE', key, KEEP) end
  if tonumber(version) <= tonumber(ARGV[4]) then return false end
  return {version, call('HGET', key, 'd')}
end

if action == 'publish' then
  local key = NS .. 'p:' .. name
  local found = call('HGET', key, 'v')
  local before, version = found and tonumber(found) or 0, tonumber(ARGV[4])
  if version < before then return 0 end
  if version == before then return call('HGET', key, 'd') == ARGV[5] and 1 or 0 end
  call('HSET', key, 'v', ARGV[4], 'd', ARGV[5])
  call('PEXPIRE', key, KEEP)
  return 1
end

local HOURS, TALLY = NS .. 'qh:' .. name, NS .. 'q:' .. name .. ':'

if action == 'tally' then
  local hour, keep, most, rest = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
  call('ZREMRANGEBYSCORE', HOURS, '-inf', string.format('%.0f', now - keep))
  if hour <= now - keep then return 1 end
  if not call('SET', NS .. 'qt:' .. ARGV[8], '1', 'NX', 'PX', REPEATED) then return 1 end
  local key = TALLY .. ARGV[4]
  local room = most - call('HLEN', key) + call('HEXISTS', key, rest)
  for i = 9, #ARGV, 2 do
    local field = ARGV[i]
    if field ~= rest and call('HEXISTS', key, field) == 0 then
      if room > 0 then room = room - 1 else field = rest end
    end
    call('HINCRBY', key, field, ARGV[i + 1])
  end
  local left = hour + keep - now
  call('PEXPIRE', key, left)
  call('ZADD', HOURS, ARGV[4], ARGV[4])
  if call('PTTL', HOURS) < left then call('PEXPIRE', HOURS, left) end
  return 1
end

if action == 'hours' then
  local first, over = tonumber(ARGV[4]), now - tonumber(ARGV[5])
  if first <= over then first = over + 1 end
  return call('ZRANGEBYSCORE', HOURS, string.format('%.0f', first), '+inf')
end

if action == 'tallies' then
  local found = {}
  for i = 4, #ARGV do found[i - 3] = call('HGETALL', TALLY .. ARGV[i]) end
  return found
end

local MARK = NS .. 'r:' .. name

if action == 'mark' then
  local till, token = tonumber(ARGV[4]), ARGV[5]
  local value = call('GET', MARK)
  if value then
    local over, by = string.match(value, '^(%d+) (%S+)$')
    if tonumber(over) > now then return by == token and 1 or 0 end
  end
  if till <= now then return 0 end
  call('SET', MARK, ARGV[4] .. ' ' .. token, 'PX', till - now + GRACE)
  return 1
end

call('DEL', MARK)
return 1
