-- settle: put what was really used in the place of what is held, once for each call id, and append the usage records.
--
-- ARGV: clock, tombstone's life, records to keep, new shapes, then the settlements: MessagePack arrays of
--   call id, its record's call id or nil, record, number of actuals, actuals, whether receipts are to hand,
--   receipts or nil: {shape, at, claims as in a hold}, debits or nil: {shape, claims as `take` reads them}
-- Reply: clock, then for each settlement {status, number of claims, overages if there are any}, with the status
--   1 settled  2 late  3 lost  4 duplicate  5 cancelled
--   6 the hold is not known: send the receipts along   7 a calendar window is over: work it out again   8 a shape is not known
learn_shapes(ARGV[4])
local life, keep = tonumber(ARGV[2]), tonumber(ARGV[3])

local all, hold_names, ids = {}, {}, {}
for r = 5, #ARGV do
  local s = cmsgpack.unpack(ARGV[r])
  all[r - 4] = s
  ids[r - 4] = s[1]
  hold_names[r - 4] = HOLD .. s[1]
end
local values = values_of(hold_names)

local parsed, names = {}, {}
for r = 1, #all do
  local s, value = all[r], values[r]
  local p = {}
  local q = 5 + s[4]
  p.receipts_to_hand, p.receipts, p.debits = s[q], s[q + 1], s[q + 2]
  if value then
    local h = cmsgpack.unpack(value)
    p.state = h[1]
    if h[1] == 'E' then
      p.till = h[2]
      h = cmsgpack.unpack(h[3])
    elseif h[1] == 'O' then
      p.owner = owner_of(h, s[1])
    else
      p.till = h[2]
      h = nil
    end
    local shape = h and shape_of(h[6])
    if shape then
      p.claims = claims_of(h, h[3], shape, 7)
      names_of(p.claims, names)
    elseif h then
      p.unknown = true
    end
  end
  if p.receipts then
    local shape = shape_of(p.receipts[1])
    if shape then
      p.lost = claims_of(p.receipts, p.receipts[2], shape, 3)
      names_of(p.lost, names)
    else
      p.unknown = true
    end
  end
  if p.debits then
    local shape = shape_of(p.debits[1])
    if shape then
      local f, at, debits = p.debits, 2, {}
      for i = 1, #shape, 5 do
        local kind, flags = shape[i], shape[i + 3]
        local c = {kind = kind, p1 = shape[i + 1], p2 = shape[i + 2], flags = flags, name = CELL .. shape[i + 4] .. f[at], pin = now}
        at = at + 1 + (kind == DISTINCT and 1 or 0) + (flags >= 8 and 1 or 0)
        c.amount, c.limit = f[at], f[at + 1]
        at = at + 2
        if kind == CALENDAR then
          c.start, c.finish = f[at], f[at + 1]
          at = at + 2
        end
        debits[#debits + 1] = c
      end
      p.current = debits
      names_of(debits, names)
    else
      p.unknown = true
    end
  end
  parsed[r] = p
end
load_cells(names)

local function over(p)
  if not p.current then return false end
  for i = 1, #p.current do
    local c = p.current[i]
    local cell = cells[c.name]
    if c.kind == CALENDAR and c.amount > 0 and (not cell or now >= cell[4]) and (now < c.start or now >= c.finish) then return true end
  end
  return false
end

local replies, ended, done, recorded, back = {now}, {}, {}, {}, {}
for r = 1, #all do
  local s, p = all[r], parsed[r]
  local id, record = s[1], s[3]
  local state = p.state
  local actuals, nothing = {}, s[4] == 0
  for i = 1, s[4] do actuals[i] = s[4 + i] end
  local status, overages, any = nil, nil, false
  if done[id] then
    state, p.till = done[id], now + 1
  elseif state and state ~= 'O' and now >= p.till then
    state = nil
  end
  if back[id] then
    status = back[id] -- the one before it comes first when they are sent again, too
  elseif p.unknown then
    status = 8
  elseif over(p) and state ~= 'S' and state ~= 'C' then
    status = 7
  elseif state == 'O' then
    status = 1
    overages, any = release(p.claims, actuals, nothing)
  elseif state == 'E' then
    status = 2
    overages, any = charge(p.claims, actuals, nothing, true)
  elseif state or recorded[id] or call('HEXISTS', LEDGER_IDS, id) == 1 then
    status = 4
  elseif not record and not p.receipts_to_hand and not p.current then
    status = 5
  elseif p.receipts_to_hand and not p.lost then
    status = 6
  else
    status = 3
    overages, any = charge(p.lost or {}, actuals, nothing, false)
  end
  if status < 4 then
    if p.current then debit_current(p.current) end
    ended[#ended + 1] = {id, 'S', p.owner, record and s[2], record, status == 2}
    done[id] = 'S'
    if record then recorded[s[2]] = true end
  elseif status == 5 then
    ended[#ended + 1] = {id, 'C'}
    done[id] = 'C'
  elseif status > 5 then
    back[id] = status
  end
  local reply = {status, overages and #overages or 0}
  if any then
    for i = 1, #overages do reply[2 + i] = overages[i] end
  end
  replies[r + 1] = reply
end

-- First what needs no memory: a server without any lets a script write on that has begun to.
for i = 1, #ended do
  local id, owner = ended[i][1], ended[i][3]
  if owner then call('SREM', OPEN .. owner, id) end
end
save_cells()
for i = 1, #ended do
  local id, state, record_id, record, late = ended[i][1], ended[i][2], ended[i][4], ended[i][5], ended[i][6]
  if record_id then
    if late then append(record_id, record, keep, 'l', '1') else append(record_id, record, keep) end
  end
  call('SET', HOLD .. id, pack_array(2, {state, now + life}), 'PX', life)
end
return replies
