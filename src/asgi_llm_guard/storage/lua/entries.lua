-- Entries (entries.py): what a cache keeps beside the counters.
--
-- KEYS[1] is the namespace's epoch key, and the others are made from it, as in state.lua:
--
--   <ns>:v:<space>:<key>    entry    hash: t token, u until when, b note, n names (MessagePack array), e their epochs when it was
--                                    begun, each followed by a blank; with a value v, and a the instant at which it was stored
--   <ns>:w:<space>:<name>   epoch    of a name; whichever is missing is a new one
--
-- ARGV: clock, operation, space, key or name, then
--   begin    token, for how long, `1` to take no value, note, an id for new epochs, how long epochs are kept, names …
--   prolong  token, for how long
--   store    token, value, for how long
--   abandon  token
--   forget
--   bump     an id for the new epoch, how long epochs are kept
--   find
-- Reply: clock, then for begin and find `kept`, value, note, age; `lead`; `flight`, note, how long; or `none`; for prolong and
-- store 1 or 0.
-- Every entry says itself when it is over; the expiries only collect garbage.
local call = redis.call
local GRACE = 1000

local now = tonumber(ARGV[1]) -- 0 outside of tests: then it is the server's
if now == 0 then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local action, space, key = ARGV[2], ARGV[3], ARGV[4]
local NS = string.sub(KEYS[1], 1, -2)
local ENTRY, EPOCH = NS .. 'v:' .. space .. ':' .. key, NS .. 'w:' .. space .. ':'

local function epochs_of(names)
  if #names == 0 then return '' end
  local keys = {}
  for i = 1, #names do keys[i] = EPOCH .. names[i] end
  local found, all = call('MGET', unpack(keys)), {}
  for i = 1, #names do all[i] = (found[i] or '') .. ' ' end
  return table.concat(all)
end

-- Token, note, and until when or `false` if it is over; whether it has a value. Nothing if there is nothing.
local function look()
  local f = call('HMGET', ENTRY, 't', 'u', 'b', 'n', 'e', 'a')
  if not f[1] then return nil end
  local until_ms = tonumber(f[2])
  local live = now < until_ms and epochs_of(cmsgpack.unpack(f[4])) == f[5]
  return f[1], f[3], live and until_ms, f[6] and tonumber(f[6])
end

local function kept(note, at)
  return {now, 'kept', call('HGET', ENTRY, 'v'), note, now - at}
end

if action == 'begin' then
  local token, claim, fresh, note, id, keep = ARGV[5], tonumber(ARGV[6]), ARGV[7] == '1', ARGV[8], ARGV[9], ARGV[10]
  local names = {}
  for i = 11, #ARGV do
    names[i - 10] = ARGV[i]
    -- One that is there lives on: nothing of it is left when it goes.
    if call('PEXPIRE', EPOCH .. ARGV[i], keep) == 0 then call('SET', EPOCH .. ARGV[i], id, 'PX', keep) end
  end
  local by, its_note, until_ms, at = look()
  if until_ms and at and (not fresh or by == token) then return kept(its_note, at) end
  if until_ms and not at and by ~= token then return {now, 'flight', its_note, until_ms - now} end
  call('DEL', ENTRY)
  call('HSET', ENTRY, 't', token, 'u', string.format('%.0f', now + claim), 'b', note, 'n', cmsgpack.pack(names), 'e', epochs_of(names))
  call('PEXPIRE', ENTRY, claim + GRACE)
  return {now, 'lead'}
end

if action == 'prolong' then
  local claim = tonumber(ARGV[6])
  local by, _, until_ms, at = look()
  if by ~= ARGV[5] or not until_ms or at then return {now, 0} end
  call('HSET', ENTRY, 'u', string.format('%.0f', now + claim))
  call('PEXPIRE', ENTRY, claim + GRACE)
  return {now, 1}
end

if action == 'store' then
  local token, value, ttl = ARGV[5], ARGV[6], tonumber(ARGV[7])
  local by, _, until_ms, at = look()
  if by ~= token then return {now, 0} end
  if not until_ms then
    call('DEL', ENTRY)
    return {now, 0}
  end
  if not at then
    call('HSET', ENTRY, 'v', value, 'u', string.format('%.0f', now + ttl), 'a', string.format('%.0f', now))
    call('PEXPIRE', ENTRY, ttl + GRACE)
  end
  return {now, 1}
end

if action == 'abandon' then
  local by, _, _, at = look()
  if by == ARGV[5] and not at then call('DEL', ENTRY) end
elseif action == 'forget' then
  call('DEL', ENTRY)
elseif action == 'bump' then
  call('SET', EPOCH .. key, ARGV[5], 'PX', ARGV[6])
else
  local _, note, until_ms, at = look()
  if until_ms and at then return kept(note, at) end
end
return {now, 'none'}
